"""Handlers' exceptions that come one upon the other, or are kept by the program."""

from __future__ import annotations

import json
import os
import random
import signal
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest

import effort
from edges.interrupting import Interrupted, Strikes, interrupts
from edges.user import (
    LATER,
    SMALL,
    SUCCESS,
    User,
    holds_only,
    settings,
    start_owner,
    status_of,
)
from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    DataType,
    KVHeads,
    KVLayout,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.testing.cluster import NodeProcess
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node

#: large enough for several threads to be at it for milliseconds
LARGE = (1, 16, 1 << 21)
#: pulls that are struck
PULLS = effort.rounds(80)
#: more exceptions than a link may have streams
KEPT = 200
#: a call that is cut short ends soon, on a busy machine
SOON_S = 2.0


def pull_under_strikes(node: Node, path: str, port: int) -> tuple[int, list[str]]:
    """How often at least two exceptions struck one pull; what was wrong."""
    user, strikes, draw = User(node, path, port, shape=LARGE), Strikes(), random.Random(1)
    user.pull()
    twice, wrong = 0, []
    for _ in range(20 * PULLS):
        if twice == PULLS:
            break
        again_s = draw.choice((2e-5, 5e-5, 2e-4))
        came = strikes.within(user.pull, draw.uniform(1e-4, 1e-2), again_s, draw.randint(2, 5))
        twice += strikes.count > 1
        if strikes.count and not isinstance(came, Interrupted):
            wrong.append(f"out came {came!r}")
        user.into[:] = LATER
        if not all(holds_only(user.into, LATER) for _ in range(3)):
            wrong.append("bytes came behind the exception")
    user.pull()
    assert status_of(partial(user.manager.unregister_cache, user.sink.cache_id)) == SUCCESS
    return twice, wrong


def test_nothing_arrives_behind_several_exceptions(
    peer: NodeProcess, victim: NodeProcess, path: str
) -> None:
    port = peer.call(start_owner, path, shape=LARGE)
    victim.begin(pull_under_strikes, path, port)
    assert victim.result(60) == (PULLS, [])


def keep(node: Node, path: str, port: int, what: str, files: list[str]) -> dict[str, int]:
    """Struck calls whose exceptions are kept, and then one more call of each: how it ended."""
    user, draw = User(node, path, port, 1000, SMALL), random.Random(1)
    strikes, kept = Strikes(files=files), list[Interrupted]()
    calls = {
        "pull": user.pull,
        # each time the peer's table is asked for anew
        "miss": lambda: user.manager.pull_blocks(BlocksCacheKey(1, 7), user.sink, [0], [0]),
    }
    expected = {"pull": SUCCESS, "miss": LLMStatusCode.LLM_KV_CACHE_NOT_EXIST}
    ends: dict[str, int] = {}
    for _ in range(50 * KEPT):
        if len(kept) == KEPT:
            break
        came = strikes.within(calls[what], draw.uniform(1e-5, 4e-4), 1e-5)
        if isinstance(came, Interrupted):
            kept.append(came)
            end = status_of(calls[what])
            ends[end.name] = ends.get(end.name, 0) + 1
            if end != expected[what]:
                break
    return ends


@pytest.mark.parametrize(("path", "what"), [("tcp", "pull"), ("tcp", "miss"), ("cma", "miss")])
def test_exceptions_that_the_program_keeps_keep_nothing_of_the_link(
    peer: NodeProcess, victim: NodeProcess, path: str, what: str
) -> None:
    files = ["peer/streams.py", "peer/lookup.py", "running/bell.py"]
    victim.begin(keep, path, peer.call(start_owner, path, shape=SMALL), what, files)
    name = {"pull": "LLM_SUCCESS", "miss": "LLM_KV_CACHE_NOT_EXIST"}[what]
    assert victim.result(60) == {name: KEPT}


def keep_of_unregistering(node: Node) -> tuple[int, int]:
    """Struck calls whose exceptions are kept; how many left a cache that is there, and not."""
    node.start(LLMRole.MIX, 2)
    draw, kept, unusable = random.Random(1), list[BaseException](), 0
    strikes = Strikes(files=["owner/catalog.py"])
    for _ in range(50 * KEPT):
        if len(kept) == KEPT:
            break
        cache = node.blocks_cache(*SMALL)
        unregister = partial(node.manager.unregister_cache, cache.cache_id)
        count = node.datadist.stats().num_caches
        came = strikes.within(unregister, draw.uniform(1e-5, 2e-4), 1e-5)
        if came is not None:
            kept.append(came)
        if node.datadist.stats().num_caches == count:
            copy = partial(node.manager.copy_blocks, cache, {0: [1]})
            unusable += status_of(copy) != SUCCESS
        unregister()
    return len(kept), unusable


def test_exceptions_that_the_program_keeps_keep_no_cache_half_unregistered(
    victim: NodeProcess,
) -> None:
    assert victim.call(keep_of_unregistering) == (KEPT, 0)


def allocate_under_strikes(node: Node, most: int) -> tuple[int, int, int]:
    """Allocations that were struck; caches, and bytes of the pool, that are left of them."""
    node.start(LLMRole.MIX, 2, mem_pool_cfg=json.dumps({"memory_size": 1 << 28}))
    desc, got, struck = CacheDesc(1, [4, 4096], DataType.DT_INT8), list[Cache](), 0
    strikes, draw, manager = Strikes(), random.Random(1), node.manager
    before = node.datadist.stats().num_caches
    for _ in range(20 * KEPT):
        if struck == KEPT:
            break
        again_s = draw.choice((2e-5, 1e-4))
        strikes.within(
            lambda: got.append(manager.allocate_blocks_cache(desc)),
            draw.uniform(2e-5, 4e-4),
            again_s,
            draw.randint(1, most),
        )
        struck += strikes.count > 0
        while got:
            manager.deallocate_blocks_cache(got.pop())
    eventually(lambda: node.datadist.stats().num_caches == before, 5)
    ((usage,),) = node.datadist.pools().values()
    left = usage.capacity_nbytes - usage.free_nbytes
    return struck, node.datadist.stats().num_caches - before, left


@pytest.mark.parametrize("most", [1, 4])
def test_an_allocation_that_is_struck_keeps_no_memory(victim: NodeProcess, most: int) -> None:
    victim.begin(allocate_under_strikes, most)
    assert victim.result(60) == (KEPT, 0, 0)


def add_shard(node: Node, heads: KVHeads, key: BlocksCacheKey | None = None) -> Cache:
    """A cache with these heads of a model of two."""
    desc = CacheDesc(2, [8, 4, heads.count, 16], DataType.DT_INT8)
    tensors = np.ones((2, 8, 4, heads.count, 16), np.int8)
    layout = KVLayout.of(desc, "BNHD", heads=heads)
    return node.manager.register_blocks_cache(desc, tensors, key, layout=layout)


def hold_shard(node: Node, cluster_id: int) -> int:
    address = "127.0.0.1:0"
    port = node.start(LLMRole.PROMPT, cluster_id, listen_ip_info=address, **settings("tcp"))
    add_shard(node, KVHeads.share(2, cluster_id - 1, 2), BlocksCacheKey(cluster_id))
    return port


def link_to_both(node: Node, ports: list[int]) -> None:
    node.start(LLMRole.DECODER, 3, **settings("tcp", 60_000))
    for cluster_id, port in enumerate(ports, 1):
        assert node.link(port, cluster_id) == SUCCESS
    node.caches[0] = add_shard(node, KVHeads.all(2))


def pull_both(node: Node) -> str:
    """How it ended."""
    blocks, how = list(range(8)), ""
    sources = {BlocksCacheKey(1): blocks, BlocksCacheKey(2): blocks}
    with interrupts():
        try:
            node.manager.pull_shards(sources, node.caches[0], blocks)
        except Exception as error:
            how = type(error).__name__
    return how


@pytest.mark.parametrize("stopped", [1, 2])
def test_a_pull_of_shards_that_is_interrupted_does_not_wait_for_a_source(
    peer: NodeProcess, victim: NodeProcess, stopped: int
) -> None:
    """The source has stopped: a helper waits for it, or the caller."""
    with NodeProcess() as other:
        sources = [peer, other]
        ports = [each.call(hold_shard, i) for i, each in enumerate(sources, 1)]
        victim.call(link_to_both, ports)
        assert victim.call(pull_both) == ""
        sources[stopped - 1].pause()
        try:
            victim.begin(pull_both)
            with pytest.raises(TimeoutError):
                victim.result(0.5)
            with takes_at_most(SOON_S):
                os.kill(victim.pid, signal.SIGALRM)
                assert victim.result(10) == "Interrupted"
        finally:
            sources[stopped - 1].resume()
