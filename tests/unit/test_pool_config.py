"""The JSON of the pool options. Spec 7.2, 8.1, decision D7."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.pool_config import BufPoolConfig, PoolConfig, SizeClass

MIB = 1024 * 1024
DOCUMENTED_CLASS = {"total_size": 2097152, "blk_size": 256, "max_buf_size": 8192}


@pytest.mark.shows("pool.config")
def test_the_documented_pool_is_read() -> None:
    pool = PoolConfig.parse('{"memory_size": 18737418240, "page_shift": 16}')
    assert pool == PoolConfig(memory_nbytes=18737418240, page_shift=16)


@pytest.mark.shows("pool.config")
def test_pages_have_64_kib_unless_told_otherwise() -> None:
    assert PoolConfig.parse('{"memory_size": 65536}').page_nbytes == 65536


def test_a_trailing_fraction_of_a_page_is_not_counted() -> None:
    assert PoolConfig(102428800).num_pages == 1562


@pytest.mark.shows("pool.config")
def test_other_fields_of_a_pool_are_passed_over() -> None:
    assert PoolConfig.parse('{"memory_size": 65536, "colour": "red"}') == PoolConfig(65536)


@pytest.mark.shows("pool.config")
@pytest.mark.parametrize("page_shift", [10, 30])
def test_the_ends_of_the_page_shifts_pass(page_shift: int) -> None:
    assert PoolConfig(2**30, page_shift).page_nbytes == 2**page_shift


@pytest.mark.shows("pool.config", "D7")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "{memory_size}",
        '[{"memory_size": 65536}]',
        '"65536"',
        '{"memory_size": 65536.0}',
        '{"memory_size": "65536"}',
        '{"memory_size": -65536}',
        '{"memory_size": true}',
        '{"memory_size": null}',
        '{"memory_size": 0}',
        '{"memory_size": 65535}',
        '{"memory_size": 18446744073709551615}',
        '{"memory_size": 4398046510080, "page_shift": 10}',
        '{"memory_size": 65536, "page_shift": 9}',
        '{"memory_size": 4294967296, "page_shift": 31}',
        '{"memory_size": 65536, "page_shift": "16"}',
        '{"memory_size": 65536, "page_shift": 1.5}',
        '{"memory_size": 65536, "page_shift": null}',
    ],
)
def test_a_pool_that_cannot_be_is_param_invalid(text: str) -> None:
    with pytest.raises(LLMException) as caught:
        PoolConfig.parse(text)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.shows("pool.config")
def test_the_largest_number_of_pages_passes() -> None:
    assert PoolConfig(4398046510080 - 1024, 10).num_pages == 2**32 - 2


@pytest.mark.shows("buf_pool.config")
def test_the_documented_buffer_pool_is_read() -> None:
    text = json.dumps({"buf_cfg": [DOCUMENTED_CLASS], "buf_pool_size": 2147483648})
    assert BufPoolConfig.parse(text) == BufPoolConfig(
        (SizeClass(total_nbytes=2097152, block_nbytes=256, max_nbytes=8192),), 2147483648
    )


@pytest.mark.shows("buf_pool.config")
def test_both_fields_of_a_buffer_pool_are_optional() -> None:
    assert BufPoolConfig.parse("{}") == BufPoolConfig((), None)


@pytest.mark.shows("buf_pool.config")
def test_a_buffer_pool_may_be_tiny() -> None:
    assert BufPoolConfig.parse('{"buf_pool_size": 1024}').pool_nbytes == 1024


@pytest.mark.shows("buf_pool.config")
def test_classes_are_kept_in_their_order() -> None:
    text = json.dumps({"buf_cfg": [DOCUMENTED_CLASS, {**DOCUMENTED_CLASS, "max_buf_size": 16384}]})
    assert [each.max_nbytes for each in BufPoolConfig.parse(text).classes] == [8192, 16384]


@pytest.mark.shows("buf_pool.config")
@pytest.mark.parametrize(
    "size_class",
    [
        {"total_size": 2 * MIB, "blk_size": 1, "max_buf_size": 1},
        {"total_size": 4 * MIB, "blk_size": 2 * MIB, "max_buf_size": 2 * MIB},
        {"total_size": 4094 * MIB, "blk_size": 256, "max_buf_size": 4094 * MIB - 1},
    ],
)
def test_a_class_at_its_limits_passes(size_class: dict[str, int]) -> None:
    (parsed,) = BufPoolConfig.parse(json.dumps({"buf_cfg": [size_class]})).classes
    assert parsed.total_nbytes == size_class["total_size"]


@pytest.mark.shows("buf_pool.config")
@pytest.mark.parametrize(
    "changes",
    [
        {"total_size": 2 * MIB + 256},
        {"total_size": 4096 * MIB},
        {"total_size": 0},
        {"blk_size": 0},
        {"blk_size": 257},
        {"total_size": 8 * MIB, "blk_size": 4 * MIB, "max_buf_size": 4 * MIB},
        {"max_buf_size": 255},
        {"max_buf_size": 2 * MIB},
        {"max_buf_size": "8192"},
        {"max_buf_size": -1},
        {"max_buf_size": 8192.0},
    ],
)
def test_a_class_that_cannot_be_is_param_invalid(changes: dict[str, Any]) -> None:
    text = json.dumps({"buf_cfg": [{**DOCUMENTED_CLASS, **changes}]})
    with pytest.raises(LLMException) as caught:
        BufPoolConfig.parse(text)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.shows("buf_pool.config")
@pytest.mark.parametrize("field", ["total_size", "blk_size", "max_buf_size"])
def test_a_class_needs_all_its_fields(field: str) -> None:
    fields = {name: value for name, value in DOCUMENTED_CLASS.items() if name != field}
    with pytest.raises(LLMException, match=f"needs the field {field}"):
        BufPoolConfig.parse(json.dumps({"buf_cfg": [fields]}))


@pytest.mark.shows("buf_pool.config")
@pytest.mark.parametrize("second", [8192, 4096])
def test_the_largest_requests_must_increase_from_class_to_class(second: int) -> None:
    classes = [DOCUMENTED_CLASS, {**DOCUMENTED_CLASS, "max_buf_size": second}]
    with pytest.raises(LLMException, match="increase") as caught:
        BufPoolConfig.parse(json.dumps({"buf_cfg": classes}))
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.shows("buf_pool.config", "D7")
@pytest.mark.parametrize(
    "text", ["", "[]", '{"buf_cfg": {}}', '{"buf_cfg": [1]}', '{"buf_pool_size": "1"}']
)
def test_a_buffer_pool_of_another_form_is_param_invalid(text: str) -> None:
    with pytest.raises(LLMException) as caught:
        BufPoolConfig.parse(text)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
