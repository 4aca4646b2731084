"""The v1 mode: a prompt in another process, a decoder here, and what only this mode has."""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LayerSynchronizer,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
    TransferConfig,
)
from llm_datadist.kv_cache import KvCache
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, addrs_of, make_array

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from llm_datadist.kv_cache_manager import KvCacheManager

NO_ID = 2**64 - 1
PAGE = 65536
PROMPT, DECODER, MIX = LLMRole.PROMPT, LLMRole.DECODER, LLMRole.MIX
INVALID = LLMStatusCode.LLM_PARAM_INVALID
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
#: the caches of this process by id, so that nobody collects them
KEPT: dict[int, KvCache] = {}


def start(node: Node, role: LLMRole, cluster_id: int, pages: int = 256, **settings: object) -> int:
    """Starts a node in the v1 mode, with a pool of so many pages."""
    settings = {
        "enable_cache_manager": False,
        "ge_options": {"ge.flowGraphMemMaxSize": str(pages * PAGE)},
        "sync_kv_timeout": 20000,
        **settings,
    }
    return node.start(role, cluster_id, **settings)


def manager_of(node: Node) -> KvCacheManager:
    return node.datadist.kv_cache_manager


def desc_of(*shape: int) -> CacheDesc:
    """Tensors of bytes: their number first, then the shape of each."""
    return CacheDesc(shape[0], list(shape[1:]), DataType.DT_UINT8)


def make_rows(
    node: Node, *shape: int, seed: int | None = None, keys: Sequence[CacheKey] = ()
) -> KvCache:
    cache = manager_of(node).allocate_cache(desc_of(*shape), keys)
    write(node, cache, make_array(shape, seed))
    return cache


def make_blocks(
    node: Node, *shape: int, seed: int | None = None, key: BlocksCacheKey | None = None
) -> KvCache:
    cache = manager_of(node).allocate_blocks_cache(desc_of(*shape), key)
    write(node, cache, make_array(shape, seed))
    return cache


def tensors_of(node: Node, cache: KvCache) -> list[Bytes]:
    manager, count = manager_of(node), cache.cache_desc.num_tensors
    return [manager.get_cache_tensors(cache, index)[0].numpy() for index in range(count)]


def write(node: Node, cache: KvCache, array: Bytes) -> None:
    for tensor, values in zip(tensors_of(node, cache), array, strict=True):
        tensor[:] = values


def read(node: Node, cache: KvCache) -> Bytes:
    return np.stack(tensors_of(node, cache))


def keep(cache: KvCache) -> int:
    KEPT[cache.cache_id] = cache
    return cache.cache_id


def add_rows(node: Node, *shape: int, **kwargs: Any) -> int:
    return keep(make_rows(node, *shape, **kwargs))


def add_blocks(node: Node, *shape: int, **kwargs: Any) -> int:
    return keep(make_blocks(node, *shape, **kwargs))


def add_rows_that_nobody_holds(node: Node, *shape: int, **kwargs: Any) -> int:
    return make_rows(node, *shape, **kwargs).cache_id


def addresses(node: Node, cache_id: int) -> list[int]:
    return KEPT[cache_id].per_device_tensor_addrs[0]


def read_kept(node: Node, cache_id: int) -> Bytes:
    return read(node, KEPT[cache_id])


def deallocate_kept(node: Node, cache_id: int) -> None:
    manager_of(node).deallocate_cache(KEPT[cache_id])


def remove_key(node: Node, key: CacheKey) -> None:
    manager_of(node).remove_cache_key(key)


def status_of(error: pytest.ExceptionInfo[LLMException]) -> LLMStatusCode:
    return error.value.status_code


def assert_refused(
    status: LLMStatusCode, says: str | None, call: Callable[..., object], *args: Any, **kwargs: Any
) -> None:
    with pytest.raises(LLMException, match=says) as error:
        call(*args, **kwargs)
    assert status_of(error) == status


class Gate(LayerSynchronizer):
    """Holds each layer back until `open` is called; refuses one of them."""

    def __init__(self, refused: int = -1) -> None:
        self._refused = refused
        self._is_open = threading.Event()

    def open(self) -> Gate:
        self._is_open.set()
        return self

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return self._is_open.wait(30) and layer_index != self._refused


@dataclass
class Pair:
    """A node here, linked to a node (cluster 1) in another process."""

    node: Node
    peer: NodeProcess

    @property
    def manager(self) -> KvCacheManager:
        return manager_of(self.node)


def make_pair(node: Node, peer: NodeProcess, path: str, theirs: LLMRole, ours: LLMRole) -> Pair:
    port = peer.call(start, theirs, 1, listen_ip_info="127.0.0.1:0", transfer_path=path)
    start(node, ours, 2, transfer_path=path)
    assert node.link(port, 1) == LLMStatusCode.LLM_SUCCESS
    assert [link.path for link in node.datadist.links()] == [path]
    return Pair(node, peer)


@pytest.fixture
def decoder(node: Node, peer: NodeProcess, path: str) -> Pair:
    """A decoder here, linked to a prompt."""
    return make_pair(node, peer, path, PROMPT, DECODER)


@pytest.fixture
def prompt(node: Node, peer: NodeProcess, path: str) -> Pair:
    """A prompt here, linked to a decoder."""
    return make_pair(node, peer, path, DECODER, PROMPT)


@pytest.fixture
def alone(node: Node) -> Node:
    """A prompt without peers."""
    start(node, PROMPT, 1)
    return node


@pytest.fixture
def datadist() -> Iterator[LLMDataDist]:
    datadist = LLMDataDist(PROMPT, 1)
    yield datadist
    datadist.finalize()


# -- life ------------------------------------------------------------------------------------------


def test_raw_options_without_the_cache_manager_are_the_v1_mode(datadist: LLMDataDist) -> None:
    datadist.init({"ge.exec.deviceId": "0", "ge.flowGraphMemMaxSize": str(PAGE)})
    manager = datadist.kv_cache_manager
    assert datadist.kv_cache_manager is manager
    assert manager.allocate_cache(desc_of(1, 1, PAGE)).cache_id == 1
    assert_refused(INVALID, "cache manager is off", lambda: datadist.cache_manager)


def test_with_the_cache_manager_there_is_no_v1_mode(node: Node) -> None:
    node.start(PROMPT, 1)
    assert_refused(INVALID, "v1 mode", manager_of, node)


def test_options_that_say_nothing_of_a_pool_get_one(datadist: LLMDataDist) -> None:
    datadist.init({})
    cache = datadist.kv_cache_manager.allocate_cache(desc_of(1, 1, 8))
    assert len(cache.per_device_tensor_addrs[0]) == 1


def test_caches_of_before_a_finalize_are_no_caches_of_now(node: Node) -> None:
    start(node, PROMPT, 1)
    before, old = manager_of(node), make_blocks(node, 1, 4, 16)
    node.stop()
    assert_refused(INVALID, "was finalized", before.allocate_cache, desc_of(1, 1, 8))
    assert_refused(INVALID, "was finalized", before.copy_blocks, old, {0: [1]})
    start(node, PROMPT, 1)
    new = make_blocks(node, 1, 4, 16, seed=1)
    assert new.cache_id == old.cache_id
    manager = manager_of(node)
    assert_refused(NOT_EXIST, "another KvCacheManager", manager.copy_blocks, old, {0: [1]})
    assert_refused(NOT_EXIST, "another KvCacheManager", manager.get_cache_tensors, old)
    manager.deallocate_cache(old)
    del old
    gc.collect()
    assert np.array_equal(read(node, new), make_array((1, 4, 16), 1))


def test_an_array_outlives_a_finalize(victim: NodeProcess) -> None:
    assert victim.call(read_after_finalize) == [7] * PAGE


def read_after_finalize(node: Node) -> list[int]:
    """In a process of its own, which it would end if the memory were gone."""
    start(node, PROMPT, 1, pages=1)
    array: Bytes = manager_of(node).get_cache_tensors(make_rows(node, 1, 1, PAGE))[0].numpy()
    array[:] = 7
    node.stop()
    return list(array[0].tolist())


# -- roles -----------------------------------------------------------------------------------------

DESC = desc_of(2, 4, 16)
TARGET = TransferConfig(1, [0, 0])
ROLE_CALLS: dict[str, Callable[[KvCacheManager, KvCache, KvCache], object]] = {
    "allocate_cache": lambda m, rows, blocks: m.allocate_cache(DESC, [CacheKey(1, 1)]),
    "allocate_blocks_cache": lambda m, rows, blocks: m.allocate_blocks_cache(
        DESC, BlocksCacheKey(1)
    ),
    "remove_cache_key": lambda m, rows, blocks: m.remove_cache_key(CacheKey(1, 1)),
    "pull_cache": lambda m, rows, blocks: m.pull_cache(CacheKey(9, 1), rows),
    "pull_blocks": lambda m, rows, blocks: m.pull_blocks(BlocksCacheKey(9), blocks, [0], [0]),
    "transfer_cache_async": lambda m, rows, blocks: m.transfer_cache_async(
        rows, Gate().open(), [TARGET]
    ).synchronize(),
}


#: the calls that only another role may make
REFUSED = {
    PROMPT: ["pull_cache", "pull_blocks"],
    DECODER: [
        "allocate_cache",
        "allocate_blocks_cache",
        "remove_cache_key",
        "transfer_cache_async",
    ],
    MIX: [
        "allocate_cache",
        "remove_cache_key",
        "pull_cache",
        "pull_blocks",
        "transfer_cache_async",
    ],
}


@pytest.mark.parametrize(
    ("role", "name"), [(role, name) for role, names in REFUSED.items() for name in names]
)
def test_a_call_of_another_role_is_refused(node: Node, role: LLMRole, name: str) -> None:
    start(node, role, 1)
    manager = manager_of(node)
    caches = manager.allocate_cache(DESC), manager.allocate_blocks_cache(DESC)
    says = rf"^{name}.* is for LLMRole.*, the role of this cluster is {role}$"
    assert_refused(INVALID, says, ROLE_CALLS[name], manager, *caches)


@pytest.mark.parametrize("role", REFUSED)
def test_all_other_calls_are_every_role_s(node: Node, role: LLMRole) -> None:
    start(node, role, 1)
    manager = manager_of(node)
    caches = manager.allocate_cache(DESC), manager.allocate_blocks_cache(DESC)
    for name in set(ROLE_CALLS) - set(REFUSED[role]):
        if name.startswith("pull"):  # there is no such peer
            says = "cluster 9"
            status = LLMStatusCode.LLM_NOT_YET_LINK
            assert_refused(status, says, ROLE_CALLS[name], manager, *caches)
        else:
            ROLE_CALLS[name](manager, *caches)


def test_a_switched_role_is_the_one_that_counts(node: Node) -> None:
    start(node, DECODER, 1, enable_switch_role=True)
    key = CacheKey(1, 1)
    assert_refused(INVALID, "LLMRole.DECODER", manager_of(node).remove_cache_key, key)
    node.datadist.switch_role(PROMPT, {"llm.listenIpInfo": "127.0.0.1:0"})
    manager_of(node).remove_cache_key(key)
    cache = make_rows(node, 1, 1, 8)
    assert_refused(INVALID, "LLMRole.PROMPT", manager_of(node).pull_cache, CacheKey(2, 1), cache)


# -- allocating and freeing ------------------------------------------------------------------------


def test_only_device_memory_is_allocated(alone: Node) -> None:
    desc = CacheDesc(1, [1, 8], DataType.DT_INT8, Placement.HOST)
    assert_refused(INVALID, "got Placement.HOST", manager_of(alone).allocate_cache, desc)
    assert_refused(INVALID, "got Placement.HOST", manager_of(alone).allocate_blocks_cache, desc)


@pytest.mark.parametrize("make", [make_rows, make_blocks])
def test_deallocated_memory_is_there_for_the_next_cache(
    node: Node, make: Callable[..., KvCache]
) -> None:
    start(node, PROMPT, 1, pages=2)
    for _ in range(3):
        cache = make(node, 2, 1, PAGE)
        with pytest.raises(LLMException) as error:
            make(node, 1, 1, 1)
        assert status_of(error) == LLMStatusCode.LLM_OUT_OF_MEMORY
        manager_of(node).deallocate_cache(cache)
        assert cache.per_device_tensor_addrs == [[]]
        manager_of(node).deallocate_cache(cache)
        assert_refused(NOT_EXIST, None, manager_of(node).get_cache_tensors, cache)


def test_a_deallocated_cache_that_keys_keep_has_no_tensors(alone: Node) -> None:
    manager = manager_of(alone)
    cache = make_rows(alone, 1, 1, 8, keys=[CacheKey(1, 1)])
    manager.deallocate_cache(cache)
    assert_refused(NOT_EXIST, "no memory", manager.get_cache_tensors, cache)
    manager.copy_cache(cache, cache)  # the id is in use until the key goes
    manager.remove_cache_key(CacheKey(1, 1))
    assert_refused(NOT_EXIST, "no cache", manager.copy_cache, cache, cache)


def test_nobody_pulls_what_nobody_holds(decoder: Pair) -> None:
    target = make_rows(decoder.node, 2, 1, 64)
    held = decoder.peer.call(add_rows, 2, 1, 64, seed=1)
    decoder.manager.pull_cache(CacheKeyByIdAndIndex(1, held), target)
    dropped = decoder.peer.call(add_rows_that_nobody_holds, 2, 1, 64, seed=1)
    assert_refused(
        NOT_EXIST, None, decoder.manager.pull_cache, CacheKeyByIdAndIndex(1, dropped), target
    )


def test_a_key_keeps_what_nobody_holds_until_it_is_pulled(decoder: Pair) -> None:
    key = CacheKey(1, 5)
    cache_id = decoder.peer.call(add_rows_that_nobody_holds, 2, 1, 64, seed=1, keys=[key])
    target = make_rows(decoder.node, 2, 1, 64)
    decoder.manager.pull_cache(key, target)
    assert np.array_equal(read(decoder.node, target), make_array((2, 1, 64), 1))
    by_id = CacheKeyByIdAndIndex(1, cache_id)
    assert_refused(NOT_EXIST, None, decoder.manager.pull_cache, by_id, target)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m, cache: m.allocate_cache(None), AttributeError),
        (lambda m, cache: m.allocate_cache(DESC, CacheKey(1, 1)), TypeError),
        (lambda m, cache: m.allocate_blocks_cache(DESC, CacheKey(1, 1)), TypeError),
        (lambda m, cache: m.deallocate_cache(None), AttributeError),
        (lambda m, cache: m.deallocate_cache(cache), TypeError),
        (lambda m, cache: m.remove_cache_key(BlocksCacheKey(1)), TypeError),
        (lambda m, cache: m.copy_cache(cache, cache), TypeError),
        (lambda m, cache: m.copy_blocks(cache, {}), TypeError),
        (lambda m, cache: m.swap_blocks(cache, cache, {}), TypeError),
        (lambda m, cache: m.get_cache_tensors(cache), TypeError),
        (lambda m, cache: m.transfer_cache_async(cache, Gate(), []), TypeError),
        (lambda m, cache: m.transfer_cache_async(None, Gate(), []), TypeError),
    ],
)
def test_only_caches_of_the_v1_mode_will_do(
    alone: Node, call: Callable[[Any, Cache], object], error: type[Exception]
) -> None:
    cache = Cache(1, DESC, [1, 2], None, is_registered=False, is_blocks_cache=True)
    with pytest.raises(error):
        call(manager_of(alone), cache)


# -- pulling ---------------------------------------------------------------------------------------


def test_a_decoder_pulls_each_row_by_its_key_once(decoder: Pair) -> None:
    keys = [CacheKey(1, 10), CacheKey(1, NO_ID), CacheKey(1, 12)]
    decoder.peer.call(add_rows, 4, 3, 64, seed=1, keys=keys)
    target = make_rows(decoder.node, 4, 2, 64, seed=2)
    decoder.manager.pull_cache(keys[2], target, 1)
    expected = make_array((4, 2, 64), 2)
    expected[:, 1] = make_array((4, 3, 64), 1)[:, 2]
    assert np.array_equal(read(decoder.node, target), expected)
    assert_refused(NOT_EXIST, "req_id=12", decoder.manager.pull_cache, keys[2], target)
    decoder.peer.call(remove_key, keys[0])
    assert_refused(NOT_EXIST, "req_id=10", decoder.manager.pull_cache, keys[0], target)


def named_offsets(src: object, dst: object) -> dict[str, Any]:
    return {"src_cache_offset": src, "dst_cache_offset": dst}


@pytest.mark.parametrize(
    ("size", "src", "dst", "moved"),
    [
        (-1, None, None, 64),
        (-1, 0, 0, 64),
        (-1, 36, None, 64),
        (-1, None, 40, 24),
        (-1, 99, 63, 1),
        (17, 3, 5, 17),
        (60, 40, 4, 60),
    ],
)
def test_offsets_say_where_in_the_rows_a_pull_begins(
    decoder: Pair, size: int, src: int | None, dst: int | None, moved: int
) -> None:
    theirs = decoder.peer.call(add_rows, 4, 3, 100, seed=1)
    target = make_rows(decoder.node, 2, 2, 64, seed=2)
    given = {name: offset for name, offset in named_offsets(src, dst).items() if offset is not None}
    decoder.manager.pull_cache(
        CacheKeyByIdAndIndex(1, theirs, 2),
        target,
        1,
        size,
        src_layer_range=range(1, 2),
        **given,
    )
    src, dst = src or 0, dst or 0
    expected = make_array((2, 2, 64), 2)
    expected[:, 1, dst : dst + moved] = make_array((4, 3, 100), 1)[2:, 2, src : src + moved]
    assert np.array_equal(read(decoder.node, target), expected)


@pytest.mark.parametrize(
    ("size", "src", "dst", "says"),
    [
        (-1, 37, 0, "source's rows have behind offset 37, 63"),
        (-1, 100, 60, "offset 100 lies behind the source's rows of 100 bytes"),
        (-1, 0, 64, "offset 64 lies behind the destination's rows of 64 bytes"),
        (1, 2**63 - 1, 0, "lies behind the source's rows"),
        (1, 0, 2**63 - 1, "lies behind the destination's rows"),
        (2, 99, 0, "source's rows have behind offset 99, 1"),
        (2, 0, 63, "destination's rows have behind offset 63, 1"),
    ],
)
def test_offsets_beyond_the_rows_are_refused_and_nothing_is_written(
    decoder: Pair, size: int, src: int, dst: int, says: str
) -> None:
    theirs = decoder.peer.call(add_rows, 2, 3, 100, seed=1)
    target = make_rows(decoder.node, 2, 2, 64, seed=2)
    pull = decoder.manager.pull_cache
    key = CacheKeyByIdAndIndex(1, theirs)
    assert_refused(INVALID, says, pull, key, target, 0, size, **named_offsets(src, dst))
    assert np.array_equal(read(decoder.node, target), make_array((2, 2, 64), 2))


@pytest.mark.parametrize(
    ("offset", "error"),
    [(-1, ValueError), (2**63, ValueError), (1.0, TypeError), (True, TypeError), ("1", TypeError)],
)
def test_an_offset_is_a_number_of_bytes(node: Node, offset: object, error: type[Exception]) -> None:
    start(node, DECODER, 1)
    cache = make_rows(node, 2, 2, 64)
    with pytest.raises(error, match="src_cache_offset"):
        manager_of(node).pull_cache(CacheKey(1, 1), cache, src_cache_offset=offset)
    with pytest.raises(error, match="dst_cache_offset"):
        manager_of(node).pull_cache(CacheKey(1, 1), cache, dst_cache_offset=offset)


def test_a_deallocated_cache_does_not_exist(decoder: Pair) -> None:
    theirs = decoder.peer.call(add_rows, 2, 1, 64, seed=1)
    key, target = CacheKeyByIdAndIndex(1, theirs), make_rows(decoder.node, 2, 1, 64)
    decoder.manager.pull_cache(key, target)
    decoder.manager.deallocate_cache(target)
    assert_refused(NOT_EXIST, None, decoder.manager.pull_cache, key, target)
    decoder.peer.call(deallocate_kept, theirs)
    target = make_rows(decoder.node, 2, 1, 64)
    assert_refused(NOT_EXIST, None, decoder.manager.pull_cache, key, target)


def test_pull_blocks_moves_exactly_the_named_blocks(decoder: Pair) -> None:
    decoder.peer.call(add_blocks, 4, 16, 100, seed=1, key=BlocksCacheKey(1, 3))
    target = make_blocks(decoder.node, 4, 10, 100, seed=2)
    src, dst = [3, 0, 15, 7, 8, 9], [9, 1, 0, 4, 5, 6]
    expected = make_array((4, 10, 100), 2)
    expected[2:, dst] = make_array((4, 16, 100), 1)[:2, src]
    decoder.manager.pull_blocks(
        BlocksCacheKey(1, 3),
        target,
        src,
        dst,
        src_layer_range=range(1),
        dst_layer_range=range(1, 2),
    )
    assert np.array_equal(read(decoder.node, target), expected)


@pytest.mark.parametrize(
    ("src", "dst"), [([], [0]), ([0], []), ([0, 1], [0]), ([0], [0, 1]), ([4], [0]), ([0], [4])]
)
def test_pull_blocks_needs_pairs_of_blocks(decoder: Pair, src: list[int], dst: list[int]) -> None:
    key = BlocksCacheKey(1, 3)
    decoder.peer.call(add_blocks, 2, 4, 64, seed=1, key=key)
    target = make_blocks(decoder.node, 2, 4, 64, seed=2)
    assert_refused(INVALID, None, decoder.manager.pull_blocks, key, target, src, dst)
    assert np.array_equal(read(decoder.node, target), make_array((2, 4, 64), 2))


def test_pull_blocks_is_for_blocks_alone(decoder: Pair) -> None:
    target = make_blocks(decoder.node, 2, 4, 64)
    for key in (CacheKey(1, 1), CacheKeyByIdAndIndex(1, 1)):
        with pytest.raises(TypeError, match="prompt_cache_key"):
            decoder.manager.pull_blocks(key, target, [0], [0])  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="prompt_cache_key"):
        decoder.manager.pull_blocks(None, target, [0], [0])  # type: ignore[arg-type]


# -- layer by layer --------------------------------------------------------------------------------


def test_layers_go_to_the_addresses_of_a_decoder(prompt: Pair) -> None:
    theirs = prompt.peer.call(add_blocks, 6, 8, 64, seed=2)
    addrs = prompt.peer.call(addresses, theirs)
    cache = make_blocks(prompt.node, 6, 8, 64, seed=1)
    configs = [TransferConfig(1, addrs[2:6], range(1, 3))]
    task = prompt.manager.transfer_cache_async(cache, Gate().open(), configs, [1, 2], [3, 0])
    assert task.synchronize(20000) == LLMStatusCode.LLM_SUCCESS
    expected = make_array((6, 8, 64), 2)
    expected[2:6, [3, 0]] = make_array((6, 8, 64), 1)[2:6, [1, 2]]
    assert np.array_equal(prompt.peer.call(read_kept, theirs), expected)


def test_a_transfer_that_still_runs_has_the_code_of_this_mode(prompt: Pair) -> None:
    theirs = prompt.peer.call(add_rows, 2, 1, 64)
    addrs = prompt.peer.call(addresses, theirs)
    cache = make_rows(prompt.node, 2, 1, 64, seed=1)
    gate = Gate()
    configs = [TransferConfig(1, addrs), TransferConfig(1, addrs)]
    task = prompt.manager.transfer_cache_async(cache, gate, configs)
    assert task.synchronize(0) == LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT
    assert task.get_results(0) == [LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT] * 2
    gate.open()
    assert task.get_results() == [LLMStatusCode.LLM_SUCCESS] * 2
    assert np.array_equal(prompt.peer.call(read_kept, theirs), make_array((2, 1, 64), 1))


def test_a_transfer_holds_its_cache(prompt: Pair) -> None:
    theirs = prompt.peer.call(add_rows, 4, 1, 64)
    configs = [TransferConfig(1, prompt.peer.call(addresses, theirs))]
    gate = Gate()
    task = prompt.manager.transfer_cache_async(
        make_rows(prompt.node, 4, 1, 64, seed=1), gate, configs
    )
    gc.collect()
    make_rows(prompt.node, 4, 1, 64, seed=3)
    gate.open()
    assert task.synchronize(20000) == LLMStatusCode.LLM_SUCCESS
    assert np.array_equal(prompt.peer.call(read_kept, theirs), make_array((4, 1, 64), 1))


def test_a_refused_layer_leaves_later_ones_without_a_result(prompt: Pair) -> None:
    addrs = prompt.peer.call(addresses, prompt.peer.call(add_rows, 6, 1, 64))
    cache = make_rows(prompt.node, 6, 1, 64)
    configs = [TransferConfig(1, addrs[:2], range(i, i + 1)) for i in range(3)]
    task = prompt.manager.transfer_cache_async(cache, Gate(refused=1).open(), configs)
    assert task.synchronize(20000) == INVALID
    assert task.get_results() == [LLMStatusCode.LLM_SUCCESS, INVALID, None]


def test_arguments_of_a_transfer_that_cannot_be_are_refused_at_once(alone: Node) -> None:
    transfer, gate = manager_of(alone).transfer_cache_async, Gate().open()
    rows, configs = make_rows(alone, 2, 1, 64), [TransferConfig(1, [1, 2])]
    assert_refused(INVALID, "dst_block_memory_size", transfer, rows, gate, configs, [], [], 1)
    with pytest.raises(ValueError, match="dst_block_indices"):
        transfer(rows, gate, configs, None, [-1], 16)
    with pytest.raises(ValueError, match="src_block_indices"):
        transfer(make_blocks(alone, 2, 4, 16), gate, configs, [-1], [0])


# -- within this process ---------------------------------------------------------------------------


def test_copy_cache_copies_a_part_of_a_row(alone: Node) -> None:
    src, dst = make_rows(alone, 2, 3, 64, seed=1), make_rows(alone, 2, 2, 80, seed=2)
    manager_of(alone).copy_cache(dst, src, 1, 2, 8, 40)
    expected = make_array((2, 2, 80), 2)
    expected[:, 1, 8:48] = make_array((2, 3, 64), 1)[:, 2, 8:48]
    assert np.array_equal(read(alone, dst), expected)


def test_copy_blocks_copies_a_block_to_several(alone: Node) -> None:
    cache = make_blocks(alone, 2, 8, 64, seed=1)
    manager_of(alone).copy_blocks(cache, {1: [2, 7], 3: [0]})
    expected = make_array((2, 8, 64), 1)
    expected[:, [2, 7]], expected[:, 0] = expected[:, [1, 1]], expected[:, 3]
    assert np.array_equal(read(alone, cache), expected)


@pytest.mark.parametrize("is_nested", [False, True])
def test_blocks_are_swapped_out_to_a_cpu_cache_and_in_again(alone: Node, is_nested: bool) -> None:
    host = make_array((2, 6, 64), 2)
    desc = CacheDesc(2, [6, 64], DataType.DT_UINT8, Placement.HOST)
    addrs: Any = [addrs_of(host)] if is_nested else addrs_of(host)
    cpu, device = KvCache.create_cpu_cache(desc, addrs), make_blocks(alone, 2, 4, 64, seed=1)
    manager_of(alone).swap_blocks(device, cpu, {0: 5, 3: 1})
    expected = make_array((2, 6, 64), 2)
    expected[:, [5, 1]] = make_array((2, 4, 64), 1)[:, [0, 3]]
    assert np.array_equal(host, expected)
    manager_of(alone).swap_blocks(cpu, device, {5: 2})
    assert np.array_equal(read(alone, device)[:, 2], make_array((2, 4, 64), 1)[:, 0])


def test_a_cpu_cache_is_for_swapping_alone(alone: Node) -> None:
    host = make_array((2, 6, 64), 2)
    desc = CacheDesc(2, [6, 64], DataType.DT_UINT8, Placement.HOST)
    cpu = KvCache.create_cpu_cache(desc, addrs_of(host))
    manager = manager_of(alone)
    assert_refused(NOT_EXIST, None, manager.copy_blocks, cpu, {0: [1]})
    assert_refused(NOT_EXIST, "no memory of this library", manager.get_cache_tensors, cpu)
    manager.deallocate_cache(cpu)
    assert cpu.per_device_tensor_addrs == [addrs_of(host)]


# -- tensors ---------------------------------------------------------------------------------------


def test_a_tensor_is_the_memory_of_the_cache(alone: Node) -> None:
    desc = CacheDesc(2, [3, 2, 4], DataType.DT_FLOAT16)
    cache = manager_of(alone).allocate_cache(desc)
    tensors = manager_of(alone).get_cache_tensors(cache, 1)
    assert len(tensors) == 1
    array = tensors[0].numpy()
    assert (array.dtype, array.shape) == (np.dtype(np.float16), (3, 2, 4))
    array[:] = np.arange(24).reshape(3, 2, 4)
    again = manager_of(alone).get_cache_tensors(cache, 1)[0].numpy()
    assert np.array_equal(again, np.arange(24).reshape(3, 2, 4))
    assert addrs_of(again[None]) == cache.per_device_tensor_addrs[0][1:]


def test_bf16_is_shown_as_a_copy_in_float32(alone: Node) -> None:
    cache = manager_of(alone).allocate_cache(CacheDesc(1, [1, 4], DataType.DT_BF16))
    byte_desc = CacheDesc(1, [4, 2], DataType.DT_UINT8, Placement.HOST)
    bits = np.array([[0x3F80, 0xC020, 0x0000, 0x4049]], np.uint16)
    cpu = KvCache.create_cpu_cache(byte_desc, [int(bits.ctypes.data)])
    blocks = manager_of(alone).allocate_blocks_cache(CacheDesc(1, [4, 1], DataType.DT_BF16))
    manager_of(alone).swap_blocks(cpu, blocks, {i: i for i in range(4)})
    shown = manager_of(alone).get_cache_tensors(blocks)[0].numpy()
    assert shown.dtype == np.float32
    assert shown[:, 0].tolist() == [1.0, -2.5, 0.0, 3.140625]
    shown[:] = 9
    assert manager_of(alone).get_cache_tensors(blocks)[0].numpy()[0, 0] == 1.0
    assert manager_of(alone).get_cache_tensors(cache)[0].numpy().shape == (1, 4)


def test_a_tensor_has_the_shape_that_was_allocated(alone: Node) -> None:
    desc = desc_of(1, 4, 16)
    cache = manager_of(alone).allocate_cache(desc)
    desc.update_dim(1, 2**40)
    assert manager_of(alone).get_cache_tensors(cache)[0].numpy().shape == (4, 16)


@pytest.mark.parametrize(
    ("index", "error"), [(2, LLMException), (-1, ValueError), (0.0, TypeError), (None, TypeError)]
)
def test_a_tensor_index_that_is_none_is_refused(
    alone: Node, index: Any, error: type[Exception]
) -> None:
    cache = make_rows(alone, 2, 1, 8)
    with pytest.raises(error, match="tensor_index"):
        manager_of(alone).get_cache_tensors(cache, index)


def test_strings_have_no_tensor(alone: Node) -> None:
    cache = manager_of(alone).allocate_cache(CacheDesc(1, [2], DataType.DT_STRING))
    assert_refused(INVALID, "DT_STRING", manager_of(alone).get_cache_tensors, cache)
