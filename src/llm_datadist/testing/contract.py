"""What every transport must keep, as tests that run on any: ours, and those of other packages.

    from llm_datadist.testing.contract import TransportContract

    class TestMine(TransportContract):
        path = "mine"

pytest then runs the contract between real processes over that path, in both modes of the library
and for both placements of caches. docs/transports.md says in words what is promised.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, ClassVar, NamedTuple, cast

import numpy as np
import pytest

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.keys import BlocksCacheKey
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, addrs_of, make_array
from llm_datadist.testing.timing import eventually, takes_at_most
from llm_datadist.types import CacheDesc, DataType, LLMRole, Placement

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SUCCESS = LLMStatusCode.LLM_SUCCESS
#: what a transfer may say when the other end is gone or does not answer
LOST = (
    LLMStatusCode.LLM_NOT_YET_LINK,
    LLMStatusCode.LLM_TIMEOUT,
    LLMStatusCode.LLM_FAILED,
    LLMStatusCode.LLM_LINK_BUSY,
)
OWNER, READER = 1, 2
SYNC_TIMEOUT_MS = 1_500
#: a fifth over the timeout, and what a busy machine needs to schedule a few processes
BUDGET_S = 1.2 * SYNC_TIMEOUT_MS / 1000 + 0.3
LINK_TIMEOUT_MS = 10_000
Shape = tuple[int, int, int]
SHAPE: Shape = (3, 16, 4096)
#: no transport moves this before a signal sent meanwhile arrives
HUGE: Shape = (4, 64, 1 << 17)


class Pair(NamedTuple):
    """Two linked clusters in processes of their own."""

    owner: NodeProcess
    reader: NodeProcess


class TransportContract:
    """The contract of a transport. Subclass it and name the path."""

    #: the name of the transport
    path: ClassVar[str]
    #: the least share of one CPU that an idle end may take; ours take none
    most_idle_cpu: ClassVar[float] = 0.005

    @pytest.fixture(params=[True, False], ids=["remote-accessible", "two-sided"])
    def is_accessible(self, request: pytest.FixtureRequest) -> bool:
        return bool(request.param)

    @pytest.fixture(params=[Placement.DEVICE, Placement.HOST], ids=lambda each: each.name)
    def placement(self, request: pytest.FixtureRequest) -> Placement:
        return Placement(request.param)

    @pytest.fixture(scope="class")
    @classmethod
    def processes(cls) -> Iterator[Pair]:
        """Two processes for all tests that do not harm them."""
        with NodeProcess() as owner, NodeProcess() as reader:
            yield Pair(owner, reader)

    @pytest.fixture
    def pair(self, processes: Pair, is_accessible: bool) -> Iterator[Pair]:
        yield linked(*processes, self.path, is_accessible=is_accessible)
        for process in processes:
            process.call(Node.stop)

    @pytest.fixture
    def own_pair(self, is_accessible: bool) -> Iterator[Pair]:
        """Two processes that a test may kill."""
        with NodeProcess() as owner, NodeProcess() as reader:
            yield linked(owner, reader, self.path, is_accessible=is_accessible)

    def test_blocks_go_where_they_belong_and_nothing_else_changes(
        self, pair: Pair, placement: Placement
    ) -> None:
        pair.owner.call(own, SHAPE, placement)
        src, dst = [3, 9, 4, 15, 0], [1, 0, 15, 7, 8]
        got = pair.reader.call(pull_blocks, OWNER, SHAPE, src, dst, placement)
        expected = np.zeros(SHAPE, np.uint8)
        expected[:, dst] = make_array(SHAPE, OWNER)[:, src]
        np.testing.assert_array_equal(got, expected)

    @pytest.mark.parametrize(
        "shape",
        [(1, 1, 1), (2, 3000, 24), (1, 2, 35 << 20)],
        ids=["one byte", "6,000 segments", "70 MiB"],
    )
    def test_sizes(self, pair: Pair, shape: Shape) -> None:
        pair.owner.call(own, shape)
        assert pair.reader.call(pull_status, OWNER, shape) is SUCCESS

    def test_both_ends_pull(self, pair: Pair) -> None:
        blocks = list(range(SHAPE[1]))
        for process in pair:
            process.call(own, SHAPE)
        for process, other in ((pair.reader, OWNER), (pair.owner, READER)):
            got = process.call(pull_blocks, other, SHAPE, blocks, blocks)
            np.testing.assert_array_equal(got, make_array(SHAPE, other))

    @pytest.mark.parametrize("is_accessible", [True], ids=["remote-accessible"])
    def test_both_ends_push(self, pair: Pair) -> None:
        for process in pair:
            process.call(own, SHAPE)
        src, dst = [2, 5], [5, 11]
        for process, other, number in (
            (pair.reader, pair.owner, OWNER),
            (pair.owner, pair.reader, READER),
        ):
            landing = other.call(own, SHAPE, seed=None, model_id=7)
            process.call(push_blocks, number, src, dst)
            expected = np.zeros(SHAPE, np.uint8)
            expected[:, dst] = make_array(SHAPE, OWNER + READER - number)[:, src]
            np.testing.assert_array_equal(other.call(array_of, landing), expected)

    def test_threads_share_a_link(self, pair: Pair) -> None:
        pair.owner.call(own, SHAPE)
        assert pair.reader.call(pull_in_threads, SHAPE) == [True] * 8

    def test_what_is_registered_after_the_link_was_made(self, pair: Pair) -> None:
        blocks = list(range(SHAPE[1]))
        for seed in (5, 6):
            cache_id = pair.owner.call(own, SHAPE, seed=seed)
            got = pair.reader.call(pull_blocks, OWNER, SHAPE, blocks, blocks)
            np.testing.assert_array_equal(got, make_array(SHAPE, seed))
            pair.owner.call(disown, cache_id)
            status = pair.reader.call(pull_status, OWNER, SHAPE)
            assert status is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST

    def test_memory_that_changed_hands_is_not_read_under_its_old_name(self, pair: Pair) -> None:
        blocks = list(range(SHAPE[1]))
        first = pair.owner.call(own, SHAPE)
        pair.reader.call(pull_blocks, OWNER, SHAPE, blocks, blocks)
        pair.owner.call(hand_over, first, 9)
        status = pair.reader.call(pull_status, OWNER, SHAPE)
        assert status is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
        got = pair.reader.call(pull_blocks, OWNER, SHAPE, blocks, blocks, model_id=9)
        np.testing.assert_array_equal(got, make_array(SHAPE, 9))

    def test_an_owner_that_stands_still_is_late_for_good(self, own_pair: Pair) -> None:
        """In time an error, after which nothing arrives; or all bytes, if it need not do a thing.

        Whether the owner can be linked to again, is not asked here: some engines do not survive.
        """
        own_pair.owner.call(own, HUGE)
        assert own_pair.reader.call(pull_status, OWNER, HUGE) is SUCCESS
        own_pair.owner.pause()
        with takes_at_most(2 * BUDGET_S):
            status = own_pair.reader.call(pull_and_keep, OWNER, HUGE)
        assert status in (SUCCESS, *LOST)
        own_pair.owner.resume()
        assert own_pair.reader.call(stays_as_it_is, 1.0)

    def test_an_owner_that_is_killed_and_its_successor(self, own_pair: Pair) -> None:
        own_pair.owner.call(own, HUGE)
        assert own_pair.reader.call(pull_status, OWNER, HUGE) is SUCCESS
        own_pair.reader.begin(pull_until_lost, OWNER, HUGE)
        own_pair.owner.kill()
        with takes_at_most(2 * BUDGET_S):
            status, worst_s = cast("tuple[LLMStatusCode, float]", own_pair.reader.result())
        assert status in LOST
        assert worst_s <= BUDGET_S
        with NodeProcess() as successor:
            settings = own_pair.reader.call(settings_of)
            port = start(successor, OWNER, **settings)
            successor.call(own, SHAPE)
            assert own_pair.reader.call(link_anew, port, OWNER) is SUCCESS
            assert own_pair.reader.call(pull_status, OWNER, SHAPE) is SUCCESS

    def test_a_reader_that_is_killed_leaves_the_owner_to_others(self, own_pair: Pair) -> None:
        own_pair.owner.call(own, HUGE)
        assert own_pair.reader.call(pull_status, OWNER, HUGE) is SUCCESS
        own_pair.reader.begin(pull_until_lost, OWNER, HUGE)
        settings = own_pair.owner.call(settings_of)
        own_pair.reader.kill()
        with NodeProcess() as other:
            start(other, 3, **settings)
            assert other.call(link_anew, own_pair.owner.call(port_of), OWNER) is SUCCESS
            assert other.call(pull_status, OWNER, HUGE) is SUCCESS

    def test_linking_again_and_again_leaves_nothing_behind(self, pair: Pair) -> None:
        pair.owner.call(own, SHAPE)
        port = pair.owner.call(port_of)
        counts = [pair.reader.call(unlink_link_pull_count, port) for _ in range(6)]
        assert counts[-1] <= counts[1], counts

    @pytest.mark.slow
    @pytest.mark.parametrize("is_accessible", [True], ids=["remote-accessible"])
    def test_an_idle_link_takes_no_cpu(self, pair: Pair) -> None:
        pair.owner.call(own, SHAPE)
        assert pair.reader.call(pull_status, OWNER, SHAPE) is SUCCESS
        for process in pair:
            process.begin(cpu_share_of_doing_nothing, 3.0)
        for process in pair:
            assert cast("float", process.result()) <= self.most_idle_cpu


# -- run in the processes --


def start(process: NodeProcess, cluster_id: int, **settings: object) -> int:
    """Starts a cluster that listens; its port."""
    return process.call(Node.start, LLMRole.MIX, cluster_id, **settings)


def linked(owner: NodeProcess, reader: NodeProcess, path: str, *, is_accessible: bool) -> Pair:
    """Starts cluster 1 and cluster 2 and links the second to the first."""
    settings: dict[str, object] = {
        "transfer_path": path,
        "enable_remote_cache_accessible": is_accessible,
        "sync_kv_timeout": SYNC_TIMEOUT_MS,
        "listen_ip_info": "127.0.0.1:0",
    }
    port = start(owner, OWNER, **settings)
    start(reader, READER, **settings)
    for process in (owner, reader):
        process.call(remember, settings)
    assert reader.call(Node.link, port, OWNER, LINK_TIMEOUT_MS) is SUCCESS
    assert reader.call(paths) == owner.call(paths) == [path]
    return Pair(owner, reader)


_settings: dict[str, object] = {}
_kept: list[Bytes] = []


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


def array_of(node: Node, cache_id: int) -> Bytes:
    return node.arrays[cache_id]


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
