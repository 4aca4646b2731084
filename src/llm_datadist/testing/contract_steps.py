"""What the processes of the contract of transports do, on behalf of its tests."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.keys import BlocksCacheKey
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, addrs_of, make_array
from llm_datadist.testing.timing import eventually
from llm_datadist.types import CacheDesc, DataType, LLMRole, Placement

if TYPE_CHECKING:
    from collections.abc import Sequence

SUCCESS = LLMStatusCode.LLM_SUCCESS
#: what a transfer may say when the other end is gone or does not answer
LOST = (
    LLMStatusCode.LLM_NOT_YET_LINK,
    LLMStatusCode.LLM_TIMEOUT,
    LLMStatusCode.LLM_FAILED,
    LLMStatusCode.LLM_LINK_BUSY,
)
OWNER, READER = 1, 2
LINK_TIMEOUT_MS = 50_000
Shape = tuple[int, int, int]
SHAPE: Shape = (3, 16, 4096)
#: no transport moves this before a signal sent meanwhile arrives
HUGE: Shape = (4, 64, 1 << 17)


class Pair(NamedTuple):
    """Two linked clusters in processes of their own."""

    owner: NodeProcess
    reader: NodeProcess


def start(process: NodeProcess, cluster_id: int, **settings: object) -> int:
    """Starts a cluster that listens; its port."""
    return process.call(Node.start, LLMRole.MIX, cluster_id, **settings)


def linked(owner: NodeProcess, reader: NodeProcess, **settings: object) -> Pair:
    """Starts cluster 1 and cluster 2 and links the second to the first, by the path that is set."""
    settings["listen_ip_info"] = "127.0.0.1:0"
    port = start(owner, OWNER, **settings)
    start(reader, READER, **settings)
    for process in (owner, reader):
        process.call(remember, settings)
    assert reader.call(Node.link, port, OWNER, LINK_TIMEOUT_MS) is SUCCESS
    assert reader.call(paths) == owner.call(paths) == [settings["transfer_path"]]
    return Pair(owner, reader)


_settings: dict[str, object] = {}
_kept: list[Bytes] = []
#: kept, so that nothing is ended only because an error was forgotten
_errors: list[LLMException] = []


def remember(node: Node, settings: dict[str, object]) -> None:
    _settings.update(settings)


def settings_of(node: Node) -> dict[str, object]:
    return _settings


def paths(node: Node) -> list[str]:
    return [link.path for link in node.datadist.links()]


def port_of(node: Node) -> int:
    endpoint = node.datadist.listen_endpoint
    assert endpoint is not None
    return endpoint.port


def own(
    node: Node,
    shape: Shape,
    placement: Placement = Placement.DEVICE,
    *,
    seed: int | None = -1,
    model_id: int = 0,
) -> int:
    """Registers a cache with the bytes of a seed, by default of the cluster's id."""
    seed = node.datadist.cluster_id if seed == -1 else seed
    key = BlocksCacheKey(0, model_id)
    cache = node.blocks_cache(*shape, seed, key, placement, remote_accessible=True)
    return cache.cache_id


def disown(node: Node, cache_id: int) -> None:
    node.manager.unregister_cache(cache_id)


def hand_over(node: Node, cache_id: int, seed: int) -> None:
    """The memory of a cache gets another cache and other bytes; the key goes."""
    array = node.arrays[cache_id]
    node.manager.unregister_cache(cache_id)
    array[:] = make_array(array.shape, seed)
    desc = CacheDesc(array.shape[0], list(array.shape[1:]), DataType.DT_INT8)
    node.manager.register_blocks_cache(desc, addrs_of(array), BlocksCacheKey(0, seed))


def pull_blocks(
    node: Node,
    cluster_id: int,
    shape: Shape,
    src: Sequence[int],
    dst: Sequence[int],
    placement: Placement = Placement.DEVICE,
    *,
    model_id: int = 0,
) -> Bytes:
    """Pulls into a cache of zeros, which is unregistered again; what is in it then."""
    cache = node.blocks_cache(*shape, placement=placement, remote_accessible=True)
    try:
        node.manager.pull_blocks(BlocksCacheKey(cluster_id, model_id), cache, list(src), list(dst))
    finally:
        node.manager.unregister_cache(cache.cache_id)
        del node.caches[cache.cache_id]
        array = node.arrays.pop(cache.cache_id)
    return array


def pull_status(node: Node, cluster_id: int, shape: Shape) -> LLMStatusCode:
    """Pulls all blocks in a random order; SUCCESS means that every byte is right."""
    src = np.random.default_rng(1).permutation(shape[1]).tolist()
    dst = src[::-1]
    try:
        got = pull_blocks(node, cluster_id, shape, src, dst)
    except LLMException as error:
        return error.status_code
    np.testing.assert_array_equal(got[:, dst], _expected(shape, cluster_id)[:, src])
    return SUCCESS


@cache
def _expected(shape: Shape, seed: int) -> Bytes:
    return make_array(shape, seed)


def pull_and_keep(node: Node, cluster_id: int, shape: Shape) -> LLMStatusCode:
    """As `pull_status`; the memory that was pulled into stays where it is."""
    cache = node.blocks_cache(*shape)
    array = node.arrays[cache.cache_id]
    blocks = list(range(shape[1]))
    _kept.append(array)
    try:
        node.manager.pull_blocks(BlocksCacheKey(cluster_id, 0), cache, blocks, blocks)
    except LLMException as error:
        _errors.append(error)
        return error.status_code
    np.testing.assert_array_equal(array, _expected(shape, cluster_id))
    return SUCCESS


def stays_as_it_is(node: Node, seconds: float) -> bool:
    """Whether nothing writes to the memory that was kept."""
    before = [array.copy() for array in _kept]
    threading.Event().wait(seconds)
    return all(np.array_equal(*each) for each in zip(before, _kept, strict=True))


def push_blocks(node: Node, cluster_id: int, src: list[int], dst: list[int]) -> None:
    cache = next(iter(node.caches.values()))
    key = BlocksCacheKey(cluster_id, 7)
    node.manager.push_blocks(key, cache, src, dst, tensor_num_per_layer=1)


def pull_in_threads(node: Node, shape: Shape) -> list[bool]:
    """Eight threads, of which each pulls its two blocks ten times."""
    expected = make_array(shape, OWNER)

    def work(thread: int) -> bool:
        blocks = [2 * thread, 2 * thread + 1]
        for _ in range(10):
            got = pull_blocks(node, OWNER, shape, blocks, blocks)
            if not np.array_equal(got[:, blocks], expected[:, blocks]):
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(work, range(8)))


def pull_until_lost(node: Node, cluster_id: int, shape: Shape) -> tuple[LLMStatusCode, float]:
    """How the first pull that fails ends, and the seconds that the longest one took."""
    end, worst_s = time.monotonic() + 30, 0.0
    while time.monotonic() < end:
        begun = time.monotonic()
        status = pull_status(node, cluster_id, shape)
        worst_s = max(worst_s, time.monotonic() - begun)
        if status is not SUCCESS:
            return status, worst_s
    raise AssertionError("no pull failed")


def link_anew(node: Node, port: int, cluster_id: int) -> LLMStatusCode:
    node.unlink(port, cluster_id, LINK_TIMEOUT_MS, force=True)
    return node.link(port, cluster_id, LINK_TIMEOUT_MS)


def unlink_link_pull_count(node: Node, port: int) -> int:
    """Links anew and pulls; how many threads and descriptors there are then."""
    assert node.unlink(port, OWNER, LINK_TIMEOUT_MS) is SUCCESS
    assert node.link(port, OWNER, LINK_TIMEOUT_MS) is SUCCESS
    assert pull_status(node, OWNER, SHAPE) is SUCCESS
    counts = [0]

    def is_steady() -> bool:
        counts.append(len(os.listdir("/proc/self/fd")) + len(os.listdir("/proc/self/task")))
        return counts[-1] == counts[-2]

    assert eventually(is_steady)
    return counts[-1]


def cpu_share_of_doing_nothing(node: Node, seconds: float) -> float:
    begun = time.process_time()
    threading.Event().wait(seconds)
    return (time.process_time() - begun) / seconds
