"""core.registry by example. Spec 6.1-6.7."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from llm_datadist.core.generations import Generations
from llm_datadist.core.geometry import CacheKind, Geometry, Layout
from llm_datadist.core.messages import MAX_KEYS
from llm_datadist.core.registry import Entry, KeyName, Registry
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.kv_layout import KVLayout
from llm_datadist.types import CacheDesc, DataType, Placement

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCKS_KEY = KeyName(2**64 - 1, 0)
FIRST, SECOND, THIRD = (KeyName(number, 0) for number in range(3))


@pytest.fixture
def registry() -> Registry:
    return Registry(Generations(1))


def make_layout(kind: CacheKind = CacheKind.CONTINUOUS) -> Layout:
    return Layout.at(Geometry(kind, 4, 3, 8), [0x1000, 0x2000, 0x3000, 0x4000])


def register(
    registry: Registry, *keys: KeyName | None, kind: CacheKind = CacheKind.CONTINUOUS
) -> Entry:
    return registry.register(make_layout(kind), Placement.DEVICE, keys, is_remote_accessible=False)


def allocate(registry: Registry, keys: Sequence[KeyName | None]) -> Entry:
    return registry.allocate(make_layout(), Placement.DEVICE, keys)


def assert_missing(registry: Registry, key: KeyName) -> None:
    with pytest.raises(LLMException) as caught:
        registry.find_key(key)
    assert caught.value.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


def test_ids_count_up_from_1_for_registered_and_allocated_caches_alike(registry: Registry) -> None:
    entries = [register(registry), allocate(registry, ()), register(registry)]
    assert [entry.cache_id for entry in entries] == [1, 2, 3]


def test_an_id_that_is_gone_is_not_given_again(registry: Registry) -> None:
    registry.unregister(register(registry).cache_id)
    assert register(registry).cache_id == 2


def test_a_placeholder_takes_a_row_without_naming_it(registry: Registry) -> None:
    entry = register(registry, FIRST, None, THIRD)
    assert [registry.find_key(key) for key in (FIRST, THIRD)] == [(entry, 0), (entry, 2)]


def test_a_prefix_and_a_request_of_one_number_are_two_keys(registry: Registry) -> None:
    prefix = KeyName(FIRST.id, FIRST.model_id, is_prefix=True)
    entry = register(registry, FIRST, prefix)
    assert [registry.find_key(key)[1] for key in (FIRST, prefix)] == [0, 1]
    assert entry.keys == {FIRST: 0, prefix: 1}


def test_one_id_with_two_models_is_two_keys(registry: Registry) -> None:
    register(registry, KeyName(7, 0), KeyName(7, 1))
    assert [registry.find_key(KeyName(7, model))[1] for model in (0, 1)] == [0, 1]


def test_the_first_continuous_cache_under_a_key_keeps_it(registry: Registry) -> None:
    former = register(registry, FIRST)
    register(registry, FIRST)
    assert registry.find_key(FIRST) == (former, 0)


def test_the_last_blocks_cache_under_a_key_has_it(registry: Registry) -> None:
    register(registry, BLOCKS_KEY, kind=CacheKind.BLOCKS)
    latter = register(registry, BLOCKS_KEY, kind=CacheKind.BLOCKS)
    assert registry.find_key(BLOCKS_KEY) == (latter, 0)


def test_a_key_that_moved_away_does_not_come_back(registry: Registry) -> None:
    register(registry, BLOCKS_KEY, kind=CacheKind.BLOCKS)
    latter = register(registry, BLOCKS_KEY, kind=CacheKind.BLOCKS)
    registry.unregister(latter.cache_id)
    assert_missing(registry, BLOCKS_KEY)


def test_the_cache_that_a_key_moved_away_from_can_be_unregistered(registry: Registry) -> None:
    former = register(registry, BLOCKS_KEY, kind=CacheKind.BLOCKS)
    latter = register(registry, BLOCKS_KEY, kind=CacheKind.BLOCKS)
    registry.unregister(former.cache_id)
    assert registry.find_key(BLOCKS_KEY) == (latter, 0)


def test_unregistering_what_is_not_there_does_nothing(registry: Registry) -> None:
    assert registry.unregister(99) is None


# -- allocated caches --


def test_the_walk_through_of_the_spec_ends_with_free_memory(registry: Registry) -> None:
    entry = allocate(registry, [FIRST, None, THIRD])
    assert registry.use_up(entry.cache_id, 0, None) is None
    assert_missing(registry, FIRST)
    assert registry.deallocate(entry.cache_id) is None
    assert registry.find(entry.cache_id) is entry
    assert registry.use_up(entry.cache_id, 2, None) is entry
    assert_missing(registry, THIRD)


def test_deallocated_memory_is_kept_until_the_last_of_its_keys_goes(registry: Registry) -> None:
    entry = allocate(registry, [FIRST, SECOND])
    registry.deallocate(entry.cache_id)
    assert registry.remove_key(FIRST) is None
    assert registry.find_key(SECOND) == (entry, 1)
    assert registry.remove_key(SECOND) is entry


def test_of_a_key_given_twice_to_an_allocation_the_last_row_counts(registry: Registry) -> None:
    entry = allocate(registry, [FIRST, SECOND, FIRST])
    assert entry.keys == {FIRST: 2, SECOND: 1}


def test_two_placeholders_in_an_allocation_are_fine(registry: Registry) -> None:
    assert allocate(registry, [None, None, FIRST]).keys == {FIRST: 2}


def test_more_keys_than_rows_cannot_be_allocated(registry: Registry) -> None:
    with pytest.raises(LLMException, match="4 keys for 3 rows") as caught:
        allocate(registry, [None] * 4)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_a_bound_key_cannot_be_allocated_again(registry: Registry) -> None:
    register(registry, FIRST)
    with pytest.raises(LLMException, match="names cache 1 already") as caught:
        allocate(registry, [SECOND, FIRST])
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_a_refused_allocation_binds_none_of_its_keys(registry: Registry) -> None:
    register(registry, FIRST)
    with pytest.raises(LLMException):
        allocate(registry, [SECOND, FIRST])
    assert_missing(registry, SECOND)


def test_a_key_is_used_up_by_the_last_of_several_pulls_of_tensors(registry: Registry) -> None:
    entry = allocate(registry, [FIRST])
    for tensors in (range(1), range(2, 4)):
        registry.use_up(entry.cache_id, 0, tensors)
        assert registry.find_key(FIRST) == (entry, 0)
    registry.use_up(entry.cache_id, 0, range(1, 2))
    assert_missing(registry, FIRST)


def test_pulls_of_one_row_do_not_use_up_the_key_of_another(registry: Registry) -> None:
    entry = allocate(registry, [FIRST, SECOND])
    registry.use_up(entry.cache_id, 0, range(2))
    registry.use_up(entry.cache_id, 1, range(2, 4))
    assert entry.keys == {FIRST: 0, SECOND: 1}


def test_a_pull_that_claims_absurdly_many_tensors_ends_at_once() -> None:
    """The number comes from a peer. In another process, because the test is about hanging."""
    code = """
from llm_datadist.core.generations import Generations
from llm_datadist.core.geometry import CacheKind, Geometry, Layout
from llm_datadist.core.registry import KeyName, Registry
from llm_datadist.types import Placement

registry = Registry(Generations(1))
layout = Layout.at(Geometry(CacheKind.CONTINUOUS, 2, 1, 8), [0x1000, 0x2000])
entry = registry.allocate(layout, Placement.DEVICE, [KeyName(1, 0)])
registry.use_up(entry.cache_id, 0, range(1, 2**62))
print(entry.remaining)
"""
    run = [sys.executable, "-c", code]
    result = subprocess.run(run, timeout=10, check=True, stdout=subprocess.PIPE, text=True)
    assert result.stdout == "{KeyName(id=1, model_id=0, is_prefix=False): {0}}\n"


def test_a_prefix_is_not_used_up_and_holds_the_memory_until_it_is_removed(
    registry: Registry,
) -> None:
    prefix = KeyName(7, 0, is_prefix=True)
    entry = allocate(registry, [prefix])
    registry.use_up(entry.cache_id, 0, None)
    assert registry.deallocate(entry.cache_id) is None
    assert registry.remove_key(prefix) is entry


def test_a_registered_cache_is_never_used_up_or_freed(registry: Registry) -> None:
    entry = register(registry, FIRST)
    registry.use_up(entry.cache_id, 0, None)
    registry.deallocate(entry.cache_id)
    registry.remove_key(FIRST)
    assert registry.find_key(FIRST) == (entry, 0)


def test_an_allocated_blocks_cache_goes_at_once_with_its_key(registry: Registry) -> None:
    layout = make_layout(CacheKind.BLOCKS)
    entry = registry.allocate(layout, Placement.DEVICE, [BLOCKS_KEY])
    assert registry.deallocate(entry.cache_id) is entry
    assert_missing(registry, BLOCKS_KEY)


def test_what_was_freed_is_freed_once(registry: Registry) -> None:
    entry = allocate(registry, ())
    assert registry.deallocate(entry.cache_id) is entry
    assert registry.deallocate(entry.cache_id) is None


def test_the_oldest_held_is_the_first_allocated_that_a_key_still_holds(registry: Registry) -> None:
    register(registry, KeyName(7, 0))
    allocate(registry, ())
    first, second = allocate(registry, (FIRST, SECOND)), allocate(registry, (THIRD,))
    assert (registry.oldest_held(), registry.num_keys) == (first, 4)
    registry.remove_key(FIRST)
    assert registry.oldest_held() is first
    registry.use_up(first.cache_id, 1, None)
    assert (registry.oldest_held(), registry.num_keys) == (second, 2)
    registry.unregister(second.cache_id)
    assert registry.oldest_held() is None


def test_a_key_of_an_allocated_blocks_cache_holds_nothing(registry: Registry) -> None:
    registry.allocate(make_layout(CacheKind.BLOCKS), Placement.DEVICE, (BLOCKS_KEY,))
    assert (registry.oldest_held(), registry.num_keys) == (None, 1)


def test_more_keys_than_peers_could_be_told_are_refused(registry: Registry) -> None:
    """A peer could decode no table with such a cache, and so none of this registry's caches."""
    keys = [KeyName(number, 0) for number in range(MAX_KEYS + 1)]
    for file_it in (partial(register, registry, *keys), partial(allocate, registry, keys)):
        with pytest.raises(LLMException, match="a cache can have 65536 keys, got 65537") as caught:
            file_it()
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert register(registry).cache_id == 1


def test_layers_that_peers_could_not_be_told_are_refused(registry: Registry) -> None:
    of = KVLayout.of(CacheDesc(2, (3, 4, 2), DataType.DT_FLOAT16), "BND", layers=["a", "b"])
    layout = replace(of, layers=("a", "x" * 5000))
    with pytest.raises(LLMException, match="peers cannot be told which layers") as caught:
        registry.register(
            make_layout(), Placement.DEVICE, (), is_remote_accessible=True, kv_layout=layout
        )
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert register(registry).cache_id == 1
