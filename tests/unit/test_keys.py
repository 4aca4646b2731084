"""The keys. Spec 3.9; 10, rows 30 and 31."""

from __future__ import annotations

from typing import Any

import pytest

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.keys import NO_ID, BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex, is_valid_id


def fields(key: CacheKey) -> tuple[int, int, int, int]:
    return key.cluster_id, key.req_id, key.model_id, key.prefix_id


@pytest.mark.parametrize(
    ("value", "is_valid"), [(0, True), (NO_ID - 1, True), (NO_ID, False), (-1, False)]
)
def test_an_id_is_valid_unless_negative_or_the_mark_of_none(value: int, is_valid: bool) -> None:
    assert is_valid_id(value) is is_valid


@pytest.mark.shows("cache_key")
@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((1, 2), {}, (1, 2, 0, NO_ID)),
        ((1, 2, 3, 4), {}, (1, 2, 3, 4)),
        ((), {"cluster_id": 1, "req_id": 2}, (1, 2, 0, NO_ID)),
        ((), {"prompt_cluster_id": 1, "req_id": 2, "model_id": 3, "prefix_id": 4}, (1, 2, 3, 4)),
        ((1,), {"req_id": 2, "prefix_id": 4}, (1, 2, 0, 4)),
        ((1, 2), {"cluster_id": 9, "req_id": 9}, (1, 2, 0, NO_ID)),
        ((1, 2), {"prompt_cluster_id": 9}, (1, 2, 0, NO_ID)),
        ((), {"prompt_cluster_id": 9, "cluster_id": 1, "req_id": 2}, (1, 2, 0, NO_ID)),
        ((2**64 - 1,) * 4, {}, (2**64 - 1,) * 4),
    ],
)
def test_a_cache_key_takes_positions_before_keywords(args: Any, kwargs: Any, expected: Any) -> None:
    assert fields(CacheKey(*args, **kwargs)) == expected


@pytest.mark.shows("cache_key", "blocks_cache_key")
def test_prompt_cluster_id_is_the_cluster_id() -> None:
    assert CacheKey(5, 1).prompt_cluster_id == 5
    assert BlocksCacheKey(5).prompt_cluster_id == 5


@pytest.mark.shows("cache_key", "error.30")
@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {}, "cluster_id is required"),
        ((), {"req_id": 1}, "cluster_id is required"),
        ((), {"cluster_id": 1}, "req_id is required"),
        ((1,), {"prefix_id": 1}, "req_id is required"),
        ((1,), {"prefix": 1}, "req_id is required"),
        ((), {"cluster_id": 1, "req_id": 1, "prefix_id1": 1}, "Unsupported .*prefix_id1"),
        ((), {"cluster_id": "1", "req_id": 1, "prefix_id1": 1}, "Unsupported .*prefix_id1"),
        ((1, 2, 3, 4, 5), {}, "Param num is over limit"),
        ((1, 2, 3, 4), {"cluster_id": 1}, "Param num is over limit"),
    ],
)
def test_a_cache_key_of_other_parameters_is_param_invalid(
    args: Any, kwargs: Any, text: str
) -> None:
    with pytest.raises(LLMException, match=text) as caught:
        CacheKey(*args, **kwargs)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.shows("cache_key", "checks.integers", "error.31")
@pytest.mark.parametrize("name", ["cluster_id", "req_id", "model_id", "prefix_id"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-1, ValueError),
        (2**64, ValueError),
        ("1", TypeError),
        (1.0, TypeError),
        (None, TypeError),
        (True, TypeError),
    ],
)
def test_a_cache_key_consists_of_uint64(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        CacheKey(**{"cluster_id": 1, "req_id": 1, name: value})


@pytest.mark.shows("cache_key")
def test_a_cache_key_prints_its_fields() -> None:
    assert repr(CacheKey(1, 2, 3, 4)) == (
        "CacheKey(cluster_id=1, req_id=2, prefix_id=4, model_id=3)"
    )


@pytest.mark.shows("blocks_cache_key")
@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((1,), {}, "BlocksCacheKey(cluster_id=1, model_id=0)"),
        ((1, 2), {}, "BlocksCacheKey(cluster_id=1, model_id=2)"),
        ((), {"cluster_id": 1, "model_id": 2}, "BlocksCacheKey(cluster_id=1, model_id=2)"),
        ((), {"prompt_cluster_id": 1}, "BlocksCacheKey(prompt_cluster_id=1, model_id=0)"),
        ((1,), {"prompt_cluster_id": 2}, "BlocksCacheKey(cluster_id=1, model_id=0)"),
        ((1,), {"model_id": None}, "BlocksCacheKey(cluster_id=1, model_id=0)"),
        ((None,), {}, "BlocksCacheKey(cluster_id=None, model_id=0)"),
        ((-1, 2**64), {}, "BlocksCacheKey(cluster_id=-1, model_id=18446744073709551616)"),
    ],
)
def test_a_blocks_key_prints_as_its_caller_wrote_it(args: Any, kwargs: Any, text: str) -> None:
    assert repr(BlocksCacheKey(*args, **kwargs)) == text


@pytest.mark.shows("blocks_cache_key")
@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {}, "cluster_id is required"),
        ((), {"model_id": 1}, "cluster_id is required"),
        ((1,), {"req_id": 1}, "Unsupported"),
        ((1, 2, 3), {}, "Param num is over limit"),
    ],
)
def test_a_blocks_key_of_other_parameters_is_param_invalid(
    args: Any, kwargs: Any, text: str
) -> None:
    with pytest.raises(LLMException, match=text) as caught:
        BlocksCacheKey(*args, **kwargs)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.shows("blocks_cache_key")
@pytest.mark.parametrize("value", ["1", 1.0, True])
@pytest.mark.parametrize(
    ("name", "text"), [("cluster_id", "^The first param "), ("model_id", "^The second param ")]
)
def test_a_blocks_key_consists_of_ints(name: str, text: str, value: Any) -> None:
    with pytest.raises(TypeError, match=text + ".*only support"):
        BlocksCacheKey(**{"cluster_id": 1, name: value})


@pytest.mark.shows("cache_key_by_id_and_index")
def test_a_key_by_id_names_row_0_unless_told_otherwise() -> None:
    key = CacheKeyByIdAndIndex(1, 2)
    assert (key.cluster_id, key.cache_id, key.batch_index) == (1, 2, 0)


@pytest.mark.shows("cache_key_by_id_and_index")
@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((-1, 0, 0), ValueError, "cluster_id"),
        ((0, 2**63, 0), ValueError, "cache_id"),
        ((0, 0, 2**32), ValueError, "batch_index"),
        ((None, 0, 0), TypeError, "cluster_id"),
        ((0, "1", 0), TypeError, "cache_id"),
        ((0, 0, True), TypeError, "batch_index"),
    ],
)
def test_a_key_by_id_is_checked(args: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        CacheKeyByIdAndIndex(*args)


@pytest.mark.shows("cache_key_by_id_and_index")
def test_a_key_by_id_may_have_a_negative_cache_id() -> None:
    assert CacheKeyByIdAndIndex(0, -1).cache_id == -1


@pytest.mark.shows("cache_key_by_id_and_index")
def test_a_key_by_id_prints_its_fields() -> None:
    assert repr(CacheKeyByIdAndIndex(1, 2, 3)) == (
        "CacheKeyByIdAndIndex(cluster_id=1, cache_id=2, batch_index=3)"
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (CacheKey(1, 2), CacheKey(1, 2)),
        (BlocksCacheKey(1), BlocksCacheKey(1)),
        (CacheKeyByIdAndIndex(1, 2), CacheKeyByIdAndIndex(1, 2)),
    ],
)
def test_equal_keys_are_different_objects_of_a_set(one: object, other: object) -> None:
    assert len({one, other}) == 2
