"""The argument rules. Spec 3.1, decision O2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from llm_datadist import checks
from llm_datadist.errors import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from collections.abc import Callable

    IntCheck = Callable[[str, object], int]

RANGES = [
    (checks.check_uint8, 0, 2**8 - 1),
    (checks.check_uint16, 0, 2**16 - 1),
    (checks.check_uint32, 0, 2**32 - 1),
    (checks.check_uint64, 0, 2**64 - 1),
    (checks.check_int32, -(2**31), 2**31 - 1),
    (checks.check_int64, -(2**63), 2**63 - 1),
]


@pytest.mark.shows("checks.integers")
@pytest.mark.parametrize(("check", "low", "high"), RANGES)
def test_the_ends_of_an_int_range_pass(check: IntCheck, low: int, high: int) -> None:
    assert [check("n", low), check("n", high)] == [low, high]


@pytest.mark.shows("checks.integers")
@pytest.mark.parametrize(("check", "low", "high"), RANGES)
@pytest.mark.parametrize("beyond", [-1, 1])
def test_an_int_beyond_its_range_is_a_value_error(
    check: IntCheck, low: int, high: int, beyond: int
) -> None:
    with pytest.raises(ValueError, match=r"n must be in \["):
        check("n", high + 1 if beyond > 0 else low - 1)


@pytest.mark.shows("checks.integers", "checks.messages")
@pytest.mark.parametrize("value", [None, "1", 1.0, True, [1]])
@pytest.mark.parametrize("check", [check for check, _, _ in RANGES])
def test_what_is_no_int_is_a_type_error(check: IntCheck, value: object) -> None:
    with pytest.raises(TypeError, match="n only supports int, got"):
        check("n", value)


def test_a_message_names_parameter_value_and_type() -> None:
    with pytest.raises(TypeError, match=r"^page only supports int, got 'seven' \(str\)$"):
        checks.check_type("page", "seven", int)


def test_a_long_value_is_cut_in_messages() -> None:
    with pytest.raises(TypeError) as caught:
        checks.check_type("page", "7" * 10_000, int)
    assert len(str(caught.value)) < 200


def test_two_types_may_be_allowed() -> None:
    assert [checks.check_type("ip", 1, int, str), checks.check_type("ip", "1", int, str)] == [
        1,
        "1",
    ]


def test_a_message_names_both_types_that_are_allowed() -> None:
    with pytest.raises(TypeError, match="ip only supports int or str"):
        checks.check_type("ip", 1.5, int, str)


def test_a_bool_passes_where_a_bool_is_wanted() -> None:
    assert checks.check_type("force", True, bool) is True


@pytest.mark.shows("checks.messages")
def test_an_int_is_no_bool() -> None:
    with pytest.raises(TypeError, match="only support"):
        checks.check_type("force", 1, bool)


def test_none_passes_where_a_value_is_optional() -> None:
    assert checks.check_optional("text", None, str) is None


def test_an_optional_value_is_checked() -> None:
    with pytest.raises(TypeError, match="only support"):
        checks.check_optional("text", 1, str)


def test_an_object_that_is_none_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="cache is None"):
        checks.check_object("cache", None, str)


def test_an_object_of_another_type_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="only support"):
        checks.check_object("cache", 1, str)


@pytest.mark.parametrize("values", [[1, 2], (1, 2), [], ()])
def test_a_sequence_is_returned_as_it_came(values: object) -> None:
    assert checks.check_sequence("blocks", values, int) is values


@pytest.mark.shows("checks.messages")
@pytest.mark.parametrize("value", [None, {1, 2}, range(3), "12", 1])
def test_a_sequence_is_a_list_or_tuple(value: object) -> None:
    with pytest.raises(TypeError, match="blocks only supports list or tuple"):
        checks.check_sequence("blocks", value, int)


def test_a_list_is_no_tuple() -> None:
    with pytest.raises(TypeError, match="addrs only supports list"):
        checks.check_list("addrs", (1, 2), int)


@pytest.mark.shows("checks.integers", "checks.messages")
@pytest.mark.parametrize("stray", [None, "x", 1.0, True, [3]])
@pytest.mark.parametrize("check", [checks.check_sequence, checks.check_list])
def test_a_stray_element_is_a_type_error(check: Callable[..., object], stray: object) -> None:
    with pytest.raises(TypeError, match="blocks: inner type only supports int, got"):
        check("blocks", [1, 2, stray], int)


@pytest.mark.shows("checks.integers")
@pytest.mark.parametrize(
    ("check", "value"),
    [
        (checks.check_uint64_sequence, -1),
        (checks.check_uint64_sequence, 2**64),
        (checks.check_int64_sequence, -(2**63) - 1),
        (checks.check_int64_sequence, 2**63),
    ],
)
def test_an_element_out_of_range_is_a_value_error_that_names_its_place(
    check: Callable[[str, object], object], value: int
) -> None:
    with pytest.raises(ValueError, match=rf"blocks\[1\] must be in .*, got {value}"):
        check("blocks", [0, value])


def test_elements_at_the_ends_of_the_range_pass() -> None:
    assert checks.check_uint64_sequence("blocks", (0, 2**64 - 1)) == (0, 2**64 - 1)


def test_a_dict_is_returned_as_it_came() -> None:
    mapping = {1: "a"}
    assert checks.check_dict("ranks", mapping, int, str) is mapping


@pytest.mark.shows("checks.integers", "checks.messages")
@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([(1, "a")], "ranks only supports dict"),
        (None, "ranks only supports dict"),
        ({"1": "a"}, r"ranks \(keys\): inner type only supports int, got '1'"),
        ({True: "a"}, r"ranks \(keys\): inner type only supports int, got True"),
        ({1: 2}, r"ranks \(values\): inner type only supports str, got 2"),
    ],
)
def test_a_dict_of_other_types_is_a_type_error(value: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        checks.check_dict("ranks", value, int, str)


def test_a_json_object_is_read() -> None:
    assert checks.check_json_object("pool", '{"a": 1}') == {"a": 1}


@pytest.mark.parametrize("text", ["", "{a}", "[]", "1", "null", "9" * 5000])
def test_what_is_no_json_object_is_param_invalid(text: str) -> None:
    with pytest.raises(LLMException, match="pool") as caught:
        checks.check_json_object("pool", text)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
