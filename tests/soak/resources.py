"""What links and pulls take of a process, they give back: descriptors, threads, memory."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from llm_datadist import BlocksCacheKey, LLMException, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess, cluster_info, make_array
from llm_datadist.testing.timing import eventually
from soak import crowd
from soak import tally as t

if TYPE_CHECKING:
    from collections.abc import Callable

    from soak.tally import Tally

SUCCESS = LLMStatusCode.LLM_SUCCESS
MIB = 1 << 20

#: one process calls from each of its clusters to each of the others': 8 * 4 * 16 = 512 links
HUB_CLUSTERS, PEER_PROCESSES, PEER_CLUSTERS = 8, 4, 16
#: large enough to be seen if a link kept a copy of it
CYCLE_SHAPE = (2, 16, 1 << 14)
PULL_SHAPE = (4, 64, 256)
SYNC_S = 5.0
#: so many pulls at a time, and how many of them are looked at
PULLS, LOOKS = 500, 10
#: what an allocator keeps for the next time
SLACK_NBYTES = 2 * MIB
#: the same for the first 512 links, which leave arenas with a few live objects in each
MANY_SLACK_NBYTES = 32 * MIB
#: rounds after which nothing may grow any more
WARM_ROUNDS = 20


class Usage(NamedTuple):
    """What a process holds."""

    descriptors: int
    threads: int
    resident_nbytes: int


def usage(_: Node) -> Usage:
    return Usage(t.descriptors(), t.threads(), t.resident_nbytes())


def is_unlinked(process: NodeProcess, count: Callable[[Node], int]) -> bool:
    return eventually(lambda: process.call(count) == 0, 10)


def compare(
    tally: Tally, who: str, process: NodeProcess, before: Usage, threads: int, nbytes: int
) -> None:
    """Notes what a process holds more than before and is allowed to."""
    # the other end of a link learns a little later that it ended
    eventually(lambda: process.call(usage).descriptors <= before.descriptors, 10)
    after = process.call(usage)
    tally.leak(f"descriptors of {who}", before.descriptors, after.descriptors)
    tally.leak(f"threads of {who}", before.threads, after.threads, threads)
    tally.leak(f"memory of {who}", before.resident_nbytes, after.resident_nbytes, nbytes)


# -- 512 links at once -----------------------------------------------------------------------------


def many_links(rounds: int, tally: Tally) -> None:
    """512 links of one process at once: each is used, all are unlinked, everything comes back.

    Threads that wait for links to drain are kept for the next time, at most one a link; they end
    with their clusters. Descriptors are exactly what they were, memory with MANY_SLACK_NBYTES.
    """
    count = HUB_CLUSTERS * PEER_PROCESSES * PEER_CLUSTERS
    with ExitStack() as stack:
        hub = stack.enter_context(NodeProcess())
        peers = [stack.enter_context(NodeProcess()) for _ in range(PEER_PROCESSES)]
        processes = {"the hub": hub, **{f"peer {n}": peer for n, peer in enumerate(peers)}}
        found: dict[int, tuple[int, int]] = {}
        cold = {who: process.call(usage) for who, process in processes.items()}
        for index, peer in enumerate(peers):
            first = 1000 + index * PEER_CLUSTERS
            ids = range(first, first + PEER_CLUSTERS)
            found.update(peer.call(crowd.open_clusters, ids, "127.0.0.1:0"))
        ports = {cluster_id: port for cluster_id, (port, _) in found.items()}
        cache_ids = {cluster_id: cache_id for cluster_id, (_, cache_id) in found.items()}
        hub.call(crowd.open_clusters, range(1, HUB_CLUSTERS + 1), "")
        some = dict(list(ports.items())[::PEER_CLUSTERS])
        hub.call(crowd.link_all, some)  # starts what is started once
        hub.call(crowd.pull_all, {cluster_id: cache_ids[cluster_id] for cluster_id in some}, 0)
        hub.call(crowd.unlink_all, some, False)
        before = {who: process.call(usage) for who, process in processes.items()}
        for round_ in range(rounds):
            with tally.deadline(crowd.LINK_MS / 1000):
                statuses = hub.call(crowd.link_all, ports)
            if statuses != {int(SUCCESS): count} or hub.call(crowd.link_count) != count:
                tally.failure(f"of {count} links: {statuses}, {hub.call(crowd.link_count)} live")
            right, wrong = hub.call(crowd.pull_all, cache_ids, tally.seed + round_)
            if right != count:
                tally.failure(f"{right} of {count} pulls were right: {wrong[:3]}")
            with tally.deadline(crowd.LINK_MS / 1000):
                statuses = hub.call(crowd.unlink_all, ports, round_ % 2 == 1)
            if statuses != {int(SUCCESS): count}:
                tally.failure(f"of {count} unlinks: {statuses}")
            for who, process in processes.items():
                if not is_unlinked(process, crowd.link_count):
                    tally.failure(f"{process.call(crowd.link_count)} links are left at {who}")
                compare(tally, who, process, before[who], count, MANY_SLACK_NBYTES)
            tally.round(tally.worst_over_s)
        for who, process in processes.items():
            process.call(crowd.close_clusters)
            compare(tally, who, process, cold[who], 1, MANY_SLACK_NBYTES)


# -- links that come and go ------------------------------------------------------------------------


class Linked(NamedTuple):
    """Two processes; the second has a cache for the first to pull."""

    caller: NodeProcess
    owner: NodeProcess
    port: int


def open_pair(stack: ExitStack, path: str, shape: tuple[int, int, int]) -> Linked:
    """Not linked yet. Remote-accessible over cma, two-sided over tcp."""
    caller, owner = (stack.enter_context(NodeProcess()) for _ in range(2))
    settings: dict[str, Any] = {
        "transfer_path": path,
        "enable_remote_cache_accessible": path == "cma",
        "sync_kv_timeout": int(SYNC_S * 1000),
    }
    port = owner.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    caller.call(Node.start, LLMRole.DECODER, 2, **settings)
    owner.call(publish, shape)
    caller.call(publish, shape)
    return Linked(caller, owner, port)


def publish(node: Node, shape: tuple[int, int, int]) -> None:
    """Cache 1, which in the owner has other bytes than here."""
    cluster_id = node.datadist.cluster_id
    node.blocks_cache(*shape, seed=cluster_id, key=BlocksCacheKey(0, 0))


def pull_some(
    node: Node, shape: tuple[int, int, int], count: int, looks: int, seed: int
) -> tuple[str, float]:
    """Pulls random blocks from cluster 1, and looks at what came now and then.

    What was wrong, and the seconds of the slowest pull.
    """
    rng = np.random.default_rng(seed)
    source = make_array(shape, 1)
    array, cache = node.arrays[1], node.caches[1]
    looked_at = set(range(count - 1, -1, -max(1, count // looks)))
    blocks = [rng.permutation(shape[1])[:4].tolist() for _ in range(16)]
    key, slowest_s = BlocksCacheKey(1, 0), 0.0
    for index in range(count):
        src, dst = blocks[index % 16], blocks[(index * 7 + 3) % 16]
        if index in looked_at:
            expected = array.copy()
            expected[:, dst] = source[:, src]
            array[:, dst] ^= 0xFF
        begun = time.monotonic()
        try:
            node.manager.pull_blocks(key, cache, src, dst)
        except LLMException as error:
            return f"pull {index}: {error}", time.monotonic() - begun
        slowest_s = max(slowest_s, time.monotonic() - begun)
        if index in looked_at and not np.array_equal(array, expected):
            return f"pull {index} of {src} to {dst} brought other bytes or touched others", 0.0
    return "", slowest_s


def live_links(node: Node) -> int:
    return len(node.datadist.links())


def unlink_caller(node: Node, force: bool) -> LLMStatusCode:
    """The listener unlinks, by the id alone."""
    info = cluster_info(9, 2)
    return node.datadist.unlink_clusters([info], 5000, force)[1][0]


def link_cycles(rounds: int, tally: Tally) -> None:
    """Links are made, used and ended, by either end, by force or not; nothing is left of them."""
    rng = random.Random(tally.seed)
    with ExitStack() as stack:
        pairs = [open_pair(stack, path, CYCLE_SHAPE) for path in ("cma", "tcp")]
        before: list[tuple[Usage, Usage]] = []
        warm_rounds = min(WARM_ROUNDS, rounds // 2)
        for round_ in range(rounds):
            if round_ == warm_rounds:
                before = [(p.caller.call(usage), p.owner.call(usage)) for p in pairs]
            _cycle(pairs[round_ % 2], rng, tally)
            tally.round(tally.worst_over_s)
        for pair, (caller, owner) in zip(pairs, before, strict=True):
            compare(tally, "the caller", pair.caller, caller, 4, SLACK_NBYTES)
            compare(tally, "the owner", pair.owner, owner, 4, SLACK_NBYTES)


def _cycle(pair: Linked, rng: random.Random, tally: Tally) -> None:
    with tally.deadline(5.0):
        status = pair.caller.call(Node.link, pair.port, 1, 5000)
    if status != SUCCESS:
        tally.failure(f"link: {status}")
    wrong, _ = pair.caller.call(pull_some, CYCLE_SHAPE, 2, 2, rng.getrandbits(32))
    if wrong:
        tally.failure(wrong)
    force, by_listener = rng.random() < 0.5, rng.random() < 0.5
    with tally.deadline(5.0):
        if by_listener:
            status = pair.owner.call(unlink_caller, force)
        else:
            status = pair.caller.call(Node.unlink, pair.port, 1, 5000, force=force)
    if status != SUCCESS:
        tally.failure(f"unlink (force={force}, by_listener={by_listener}): {status}")
    for process in (pair.caller, pair.owner):
        if not is_unlinked(process, live_links):
            tally.failure("an end of a link that was unlinked stays")


# -- many small pulls ------------------------------------------------------------------------------


def small_pulls(rounds: int, tally: Tally) -> None:
    """A round is a pull, most of them one-sided: nothing grows, and the bytes are right."""
    rng = random.Random(tally.seed)
    with ExitStack() as stack:
        pairs = [open_pair(stack, path, PULL_SHAPE) for path in ("cma", "tcp")]
        for pair in pairs:
            if pair.caller.call(Node.link, pair.port, 1, 5000) != SUCCESS:
                tally.failure("the pair does not link")
            pull_round(pair, rng, tally)
        before = [(p.caller.call(usage), p.owner.call(usage)) for p in pairs]
        while tally.rounds < rounds:
            slowest_s = pull_round(pairs[rng.random() < 0.2], rng, tally)
            for _ in range(PULLS):
                tally.round(slowest_s - SYNC_S)
        for pair, (caller, owner) in zip(pairs, before, strict=True):
            compare(tally, "the puller", pair.caller, caller, 0, SLACK_NBYTES // 2)
            compare(tally, "the owner", pair.owner, owner, 1, SLACK_NBYTES // 2)


def pull_round(pair: Linked, rng: random.Random, tally: Tally) -> float:
    """The seconds of the slowest pull."""
    pair.caller.begin(pull_some, PULL_SHAPE, PULLS, LOOKS, rng.getrandbits(32))
    wrong, slowest_s = cast("tuple[str, float]", pair.caller.result())
    if wrong:
        tally.failure(wrong)
    if slowest_s > 1.2 * SYNC_S + t.SCHEDULING_S:
        tally.failure(f"a pull took {slowest_s:.3f} s of {SYNC_S} s")
    return slowest_s
