"""The v1 mode: its life, its roles, and caches that come and go."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import v1_cluster
from v1_cluster import (
    DECODER,
    INVALID,
    MIX,
    NOT_EXIST,
    PAGE,
    PROMPT,
    Gate,
    Pair,
    add_rows,
    add_rows_that_nobody_holds,
    assert_refused,
    desc_of,
    make_blocks,
    make_rows,
    manager_of,
    read,
    start,
    status_of,
)

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
    TransferConfig,
)
from llm_datadist.kv_cache import KvCache
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, make_array

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llm_datadist.kv_cache_manager import KvCacheManager

alone = v1_cluster.alone
decoder = v1_cluster.decoder


@pytest.fixture
def datadist() -> Iterator[LLMDataDist]:
    datadist = LLMDataDist(PROMPT, 1)
    yield datadist
    datadist.finalize()


# -- life --


@pytest.mark.shows("v1.allocate_cache")
def test_raw_options_without_the_cache_manager_are_the_v1_mode(datadist: LLMDataDist) -> None:
    datadist.init({"ge.exec.deviceId": "0", "ge.flowGraphMemMaxSize": str(PAGE)})
    manager = datadist.kv_cache_manager
    assert datadist.kv_cache_manager is manager
    cache = manager.allocate_cache(desc_of(1, 1, PAGE))
    assert isinstance(cache, KvCache)
    assert cache.cache_id == 1
    assert_refused(INVALID, "cache manager is off", lambda: datadist.cache_manager)


def test_with_the_cache_manager_there_is_no_v1_mode(node: Node) -> None:
    node.start(PROMPT, 1)
    assert_refused(INVALID, "v1 mode", manager_of, node)


def test_options_that_say_nothing_of_a_pool_get_one(datadist: LLMDataDist) -> None:
    datadist.init({})
    cache = datadist.kv_cache_manager.allocate_cache(desc_of(1, 1, 8))
    assert len(cache.per_device_tensor_addrs[0]) == 1


@pytest.mark.shows("v1.reinit")
def test_after_a_finalize_there_is_another_manager(datadist: LLMDataDist) -> None:
    options = {"ge.flowGraphMemMaxSize": str(PAGE), "llm.listenIpInfo": "127.0.0.1:0"}
    managers = []
    for _ in range(2):
        datadist.init(options)
        managers.append(datadist.kv_cache_manager)
        assert managers[-1].allocate_cache(desc_of(1, 1, PAGE)).cache_id == 1
        datadist.finalize()
        datadist.finalize()
    assert managers[0] is not managers[1]


@pytest.mark.shows("v1.reinit")
def test_caches_of_before_a_finalize_are_no_caches_of_now(node: Node) -> None:
    start(node, PROMPT, 1)
    before, old = manager_of(node), make_blocks(node, 1, 4, 16)
    node.stop()
    finalized = LLMStatusCode.LLM_ENGINE_FINALIZED
    assert_refused(finalized, "was finalized", before.allocate_cache, desc_of(1, 1, 8))
    assert_refused(finalized, "was finalized", before.copy_blocks, old, {0: [1]})
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


# -- roles --

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


@pytest.mark.shows(
    "v1.allocate_cache",
    "v1.allocate_blocks_cache",
    "v1.remove_cache_key",
    "v1.pull_cache",
    "v1.pull_blocks",
    "v1.transfer_cache_async",
)
@pytest.mark.parametrize(
    ("role", "name"), [(role, name) for role, names in REFUSED.items() for name in names]
)
def test_a_call_of_another_role_is_refused(node: Node, role: LLMRole, name: str) -> None:
    start(node, role, 1)
    manager = manager_of(node)
    caches = manager.allocate_cache(DESC), manager.allocate_blocks_cache(DESC)
    says = rf"^{name}.* is for LLMRole.*, the role of this cluster is {role}$"
    assert_refused(INVALID, says, ROLE_CALLS[name], manager, *caches)


@pytest.mark.shows("v1.allocate_cache", "v1.allocate_blocks_cache", "v1.remove_cache_key")
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


@pytest.mark.shows("v1.switch_role")
def test_a_switched_role_is_the_one_that_counts(node: Node) -> None:
    start(node, DECODER, 1, enable_switch_role=True)
    key = CacheKey(1, 1)
    assert_refused(INVALID, "LLMRole.DECODER", manager_of(node).remove_cache_key, key)
    node.datadist.switch_role(PROMPT, {"llm.listenIpInfo": "127.0.0.1:0"})
    manager_of(node).remove_cache_key(key)
    cache = make_rows(node, 1, 1, 8)
    assert_refused(INVALID, "LLMRole.PROMPT", manager_of(node).pull_cache, CacheKey(2, 1), cache)


@pytest.mark.shows("v1.switch_role")
def test_switching_the_role_needs_its_option(alone: Node) -> None:
    switch = alone.datadist.switch_role
    says, status = "enable_switch_role", LLMStatusCode.LLM_FEATURE_NOT_ENABLED
    assert_refused(status, says, switch, DECODER)
    assert_refused(status, says, switch, PROMPT, {"llm.listenIpInfo": "127.0.0.1:0"})
    manager_of(alone).remove_cache_key(CacheKey(1, 1))  # still for a PROMPT only


@pytest.mark.shows("v1.switch_role")
def test_a_switch_is_to_another_role_and_a_prompt_listens(node: Node, peer: NodeProcess) -> None:
    start(node, DECODER, 1, enable_switch_role=True)
    peer.call(start, DECODER, 2)
    switch, listen = node.datadist.switch_role, {"llm.listenIpInfo": "127.0.0.1:0"}
    assert_refused(INVALID, "is LLMRole.DECODER already", switch, DECODER, listen)
    assert_refused(INVALID, "PROMPT needs llm.listenIpInfo", switch, PROMPT)
    assert_refused(INVALID, "PROMPT needs llm.listenIpInfo", switch, PROMPT, {"other": "1"})
    assert port_of(node) == 0
    switch(PROMPT, listen)
    port = port_of(node)
    assert peer.call(Node.link, port, 1) == LLMStatusCode.LLM_SUCCESS
    assert_refused(LLMStatusCode.LLM_EXIST_LINK, None, switch, DECODER)
    assert peer.call(Node.unlink, port, 1) == LLMStatusCode.LLM_SUCCESS
    switch(DECODER)
    assert port_of(node) == 0
    assert peer.call(Node.link, port, 1) == LLMStatusCode.LLM_LINK_FAILED


def port_of(node: Node) -> int:
    endpoint = node.datadist.listen_endpoint
    return endpoint.port if endpoint else 0


# -- allocating and freeing --


@pytest.mark.shows("v1.allocate_cache", "v1.allocate_blocks_cache")
def test_only_device_memory_is_allocated(alone: Node) -> None:
    desc = CacheDesc(1, [1, 8], DataType.DT_INT8, Placement.HOST)
    assert_refused(INVALID, "got Placement.HOST", manager_of(alone).allocate_cache, desc)
    assert_refused(INVALID, "got Placement.HOST", manager_of(alone).allocate_blocks_cache, desc)


@pytest.mark.shows("v1.deallocate_cache", "v1.pool_full")
@pytest.mark.parametrize("make", [make_rows, make_blocks])
def test_deallocated_memory_is_there_for_the_next_cache(
    node: Node, make: Callable[..., KvCache]
) -> None:
    start(node, PROMPT, 1, pages=2)
    for _ in range(3):
        cache = make(node, 2, 1, PAGE)
        with pytest.raises(LLMException) as error:
            make(node, 1, 1, 1)
        assert status_of(error) == LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY
        assert "no room for" in str(error.value)
        manager_of(node).deallocate_cache(cache)
        assert cache.per_device_tensor_addrs == [[]]
        manager_of(node).deallocate_cache(cache)
        assert_refused(NOT_EXIST, None, manager_of(node).get_cache_tensors, cache)


@pytest.mark.shows("v1.deallocate_cache", "v1.remove_cache_key")
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
