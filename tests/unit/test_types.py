"""Enums, MemInfo and CacheDesc. Spec 3.3-3.7."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import pytest

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.types import (
    CacheDesc,
    DataType,
    LLMRole,
    MemInfo,
    Memtype,
    Placement,
    RegisterMemStatus,
    tensor_nbytes,
)

if TYPE_CHECKING:
    from enum import Enum

FP16 = DataType.DT_FLOAT16


@pytest.mark.shows("enums.values")
@pytest.mark.parametrize(
    ("enum", "members"),
    [
        (LLMRole, {"PROMPT": 1, "DECODER": 2, "MIX": 3}),
        (Placement, {"HOST": 0, "DEVICE": 1}),
        (Memtype, {"MEM_TYPE_DEVICE": 0, "MEM_TYPE_HOST": 1}),
        (RegisterMemStatus, {"OK": 0, "PREPARING": 1, "FAILED": 2}),
    ],
)
def test_enums_have_the_numbers_of_the_reference(enum: Any, members: dict[str, int]) -> None:
    assert {member.name: member.value for member in enum} == members


@pytest.mark.shows("enums.values")
@pytest.mark.parametrize(
    ("member", "text"),
    [
        (LLMRole.PROMPT, "LLMRole.PROMPT"),
        (Placement.DEVICE, "Placement.DEVICE"),
        (Memtype.MEM_TYPE_HOST, "Memtype.MEM_TYPE_HOST"),
        (RegisterMemStatus.PREPARING, "RegisterMemStatus.PREPARING"),
    ],
)
def test_enums_print_their_name(member: Enum, text: str) -> None:
    assert (str(member), f"{member}") == (text, text)


@pytest.mark.shows("enums.values")
def test_roles_and_placements_are_integers_too() -> None:
    assert all(isinstance(each, int) for each in (*LLMRole, *Placement))
    assert not any(isinstance(each, int) for each in (*Memtype, *RegisterMemStatus))


@pytest.mark.shows("data_type.sizes")
@pytest.mark.parametrize(
    ("name", "value", "itemsize"),
    [
        ("DT_FLOAT", 0, 4),
        ("DT_FLOAT16", 1, 2),
        ("DT_INT8", 2, 1),
        ("DT_INT32", 3, 4),
        ("DT_UINT8", 4, 1),
        ("DT_INT16", 6, 2),
        ("DT_UINT16", 7, 2),
        ("DT_UINT32", 8, 4),
        ("DT_INT64", 9, 8),
        ("DT_UINT64", 10, 8),
        ("DT_DOUBLE", 11, 8),
        ("DT_BOOL", 12, 1),
        ("DT_STRING", 13, 16),
        ("DT_BF16", 27, 2),
    ],
)
def test_data_types_have_number_and_size_of_the_reference(
    name: str, value: int, itemsize: int
) -> None:
    assert (DataType[name].value, DataType[name].itemsize) == (value, itemsize)


@pytest.mark.shows("data_type.sizes")
def test_there_are_fourteen_data_types() -> None:
    assert len(DataType) == 14


@pytest.mark.shows("data_type.sizes")
@pytest.mark.parametrize(
    ("shape", "nbytes"), [((3, 5), 30), ([7], 14), ((), 2), ((2**61, 1), 2**62)]
)
def test_a_tensor_has_the_bytes_of_its_elements(shape: Any, nbytes: int) -> None:
    assert tensor_nbytes(shape, FP16) == nbytes


@pytest.mark.parametrize("shape", [(0,), (4, -1), (2**62, 2), (2**31, 2**31, 2)])
def test_a_tensor_of_an_impossible_size_is_param_invalid(shape: tuple[int, ...]) -> None:
    with pytest.raises(LLMException) as caught:
        tensor_nbytes(shape, FP16)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.shows("mem_info")
def test_mem_info_keeps_what_it_was_given() -> None:
    info = MemInfo(Memtype.MEM_TYPE_HOST, 4096, -1)
    assert (info.mem_type, info.addr, info.size) == (Memtype.MEM_TYPE_HOST, 4096, -1)


@pytest.mark.shows("mem_info")
def test_mem_info_prints_its_fields() -> None:
    text = "MemInfo(mem_type=Memtype.MEM_TYPE_DEVICE, addr=16, size=32)"
    info = MemInfo(Memtype.MEM_TYPE_DEVICE, 16, 32)
    assert (str(info), repr(info)) == (text, text)


@pytest.mark.shows("mem_info")
@pytest.mark.parametrize(
    "arguments",
    [
        (0, 1, 1),
        (Placement.HOST, 1, 1),
        (Memtype.MEM_TYPE_HOST, "1", 1),
        (Memtype.MEM_TYPE_HOST, 1, 1.0),
        (Memtype.MEM_TYPE_HOST, True, 1),
    ],
)
def test_mem_info_of_wrong_types_is_a_type_error(arguments: Any) -> None:
    with pytest.raises(TypeError, match="only support"):
        MemInfo(*arguments)


@pytest.mark.shows("mem_info")
def test_mem_info_accepts_none() -> None:
    none: Any = None
    assert MemInfo(none, none, none).addr is None


@pytest.mark.shows("mem_info")
@pytest.mark.parametrize("field", ["mem_type", "addr", "size"])
def test_mem_info_cannot_be_changed(field: str) -> None:
    with pytest.raises(AttributeError):
        setattr(MemInfo(Memtype.MEM_TYPE_HOST, 1, 1), field, None)


@pytest.mark.shows("cache_desc.members")
def test_a_description_has_the_documented_defaults() -> None:
    desc = CacheDesc(80, [4, 2048, 128], FP16)
    assert desc.placement is Placement.DEVICE
    assert (desc.batch_dim, desc.seq_len_dim_index, desc.kv_tensor_format) == (0, -1, None)


@pytest.mark.shows("cache_desc.members")
@pytest.mark.parametrize("shape", [[4, 8], (4, 8)])
def test_the_shape_is_the_object_that_was_passed(shape: Any) -> None:
    assert CacheDesc(1, shape, FP16).shape is shape


@pytest.mark.shows("cache_desc.checks")
def test_no_tensors_at_all_can_be_described() -> None:
    assert CacheDesc(0, [1], FP16).num_tensors == 0


@pytest.mark.shows("cache_desc.checks", "checks.messages")
@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_tensors": "1"},
        {"num_tensors": None},
        {"num_tensors": True},
        {"shape": 4},
        {"shape": None},
        {"shape": [1, "2"]},
        {"shape": [1, True]},
        {"shape": [1, 2.0]},
        {"data_type": 1},
        {"data_type": "DT_FLOAT16"},
        {"placement": 1},
        {"placement": None},
        {"batch_dim_index": "0"},
        {"batch_dim_index": None},
        {"seq_len_dim_index": 1.0},
        {"kv_tensor_format": 1},
    ],
)
def test_a_wrong_type_in_a_description_is_a_type_error(kwargs: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"num_tensors": 1, "shape": [4, 8], "data_type": FP16, **kwargs}
    with pytest.raises(TypeError, match="only support"):
        CacheDesc(**arguments)


@pytest.mark.shows("cache_desc.checks", "error.27")
@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_tensors": -1},
        {"num_tensors": 2**32},
        {"seq_len_dim_index": 2**31},
        {"shape": [1, 2**63]},
        {"shape": [-(2**63) - 1]},
    ],
)
def test_a_number_too_wide_for_its_field_is_a_value_error(kwargs: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"num_tensors": 1, "shape": [4, 8], "data_type": FP16, **kwargs}
    with pytest.raises(ValueError, match="must be in"):
        CacheDesc(**arguments)


@pytest.mark.shows("cache_desc.checks", "error.28")
@pytest.mark.parametrize(
    "kwargs",
    [
        {"batch_dim_index": 2},
        {"batch_dim_index": -1},
        {"shape": []},
        {"seq_len_dim_index": 2},
        {"seq_len_dim_index": -2},
    ],
)
def test_an_index_outside_the_shape_is_param_invalid(kwargs: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"num_tensors": 1, "shape": [4, 8], "data_type": FP16, **kwargs}
    with pytest.raises(LLMException, match="_dim_index must be in") as caught:
        CacheDesc(**arguments)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


#: in the documented order: an argument, a value that its check refuses, and what is then said
CHECKS: list[tuple[str, Any, type[Exception], str]] = [
    ("num_tensors", -1, ValueError, "num_tensors must be in"),
    ("shape", [1, "2"], TypeError, "shape: inner type only support"),
    ("data_type", 1, TypeError, "data_type only support"),
    ("placement", 1, TypeError, "placement only support"),
    ("batch_dim_index", "0", TypeError, "batch_dim_index only support"),
    ("seq_len_dim_index", 2**31, ValueError, "seq_len_dim_index must be in"),
    ("kv_tensor_format", 1, TypeError, "kv_tensor_format only support"),
    ("batch_dim_index", 2, LLMException, "batch_dim_index must be in"),
    ("seq_len_dim_index", 2, LLMException, "seq_len_dim_index must be in"),
    ("shape", [1, 2**63], ValueError, r"shape\[1\] must be in"),
]


@pytest.mark.shows("cache_desc.checks")
@pytest.mark.parametrize(
    ("first", "second"),
    [(first, second) for first, second in combinations(CHECKS, 2) if first[0] != second[0]],
)
def test_of_two_mistakes_in_a_description_the_first_is_told(first: Any, second: Any) -> None:
    name, value, error, text = first
    arguments = {"num_tensors": 1, "shape": [4, 8], "data_type": FP16}
    with pytest.raises(error, match=text):
        CacheDesc(**{**arguments, second[0]: second[1], name: value})


@pytest.mark.shows("checks.messages")
def test_an_element_of_a_wrong_type_is_told_from_a_wrong_type() -> None:
    shape: Any = [1, "2"]
    with pytest.raises(TypeError, match="shape: inner type only supports int, got '2'"):
        CacheDesc(1, shape, FP16)


@pytest.mark.shows("cache_desc.members")
def test_the_format_of_a_tensor_is_read_back() -> None:
    assert CacheDesc(1, [4, 8], FP16, kv_tensor_format="BSH").kv_tensor_format == "BSH"


@pytest.mark.shows("cache_desc.members")
def test_size_is_the_bytes_of_one_tensor() -> None:
    assert CacheDesc(80, [4, 2048, 128], FP16).size == 4 * 2048 * 128 * 2


@pytest.mark.shows("cache_desc.members", "error.29")
@pytest.mark.parametrize("shape", [[4, 0], [-1], [2**62, 4]])
def test_a_size_that_cannot_be_is_found_out_when_asked_for(shape: list[int]) -> None:
    desc = CacheDesc(1, shape, FP16)
    with pytest.raises(LLMException) as caught:
        _ = desc.size
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.shows("cache_desc.checks", "error.29")
def test_a_missing_data_type_is_found_out_when_the_size_is_asked_for() -> None:
    none: Any = None
    desc = CacheDesc(1, [1], none)
    with pytest.raises(LLMException, match="data_type is None") as caught:
        _ = desc.size
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.shows("cache_desc.members")
def test_update_dim_changes_the_callers_list_and_the_size() -> None:
    shape = [4, 8]
    desc = CacheDesc(1, shape, FP16)
    desc.update_dim(1, 16)
    assert (shape, desc.size) == ([4, 16], 128)


@pytest.mark.shows("cache_desc.members")
def test_update_dim_leaves_the_batch_size_alone() -> None:
    desc = CacheDesc(1, [4, 8], FP16)
    desc.update_dim(0, 2)
    assert desc.batch_size == 4


@pytest.mark.shows("cache_desc.members")
def test_update_dim_of_a_tuple_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="only support"):
        CacheDesc(1, (4, 8), FP16).update_dim(0, 2)


@pytest.mark.shows("cache_desc.members")
def test_the_batch_size_is_that_of_the_batch_dimension() -> None:
    assert CacheDesc(1, [4, 8], FP16, batch_dim_index=1).batch_size == 8


@pytest.mark.shows("cache_desc.members")
@pytest.mark.parametrize(
    "field",
    [
        "num_tensors",
        "shape",
        "data_type",
        "placement",
        "batch_dim",
        "batch_size",
        "seq_len_dim_index",
        "kv_tensor_format",
        "size",
    ],
)
def test_a_description_is_changed_by_update_dim_only(field: str) -> None:
    with pytest.raises(AttributeError):
        setattr(CacheDesc(1, [4, 8], FP16), field, 1)


@pytest.mark.shows("cache_desc.members")
def test_a_description_prints_its_fields() -> None:
    assert repr(CacheDesc(2, (4, 8), FP16, Placement.HOST, 1, 0, "BSH")) == (
        "CacheDesc(num_tensors=2, shape=(4, 8), data_type=DataType.DT_FLOAT16, "
        "placement=Placement.HOST, batch_dim_index=1, seq_len_dim_index=0,kv_tensor_format=BSH)"
    )
