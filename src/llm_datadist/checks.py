"""The argument rules: what is looked at, and which exception says what is wrong. Spec 3.1.

Each function returns the value that it was given, now with a type. A wrong type is a TypeError, a
number out of range a ValueError. A bool is no int here, though Python thinks so (decision O2):
`True` as a block index or a size is a slip, and would move the wrong bytes.
"""

from __future__ import annotations

import json
import reprlib
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from llm_datadist.errors import invalid

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")
U = TypeVar("U")
V = TypeVar("V")

UINT8_MAX: Final = 2**8 - 1
UINT16_MAX: Final = 2**16 - 1
UINT32_MAX: Final = 2**32 - 1
UINT64_MAX: Final = 2**64 - 1
INT32_MAX: Final = 2**31 - 1
INT64_MAX: Final = 2**63 - 1


@overload
def check_type(name: str, value: object, kind: type[T], /) -> T: ...
@overload
def check_type(name: str, value: object, kind: type[T], other: type[U], /) -> T | U: ...
@overload
def check_type(
    name: str, value: object, kind: type[T], other: type[U], third: type[V], /
) -> T | U | V: ...
def check_type(name: str, value: object, /, *kinds: type) -> object:
    """`value`, an instance of one of `kinds`. None is not. Raises TypeError. Spec 3.1."""
    given = type(value)
    if given not in kinds and not _is_kind(given, kinds):
        raise TypeError(f"{name} only supports {_names(kinds)}, got {describe(value)}")
    return value


def check_optional(name: str, value: object, kind: type[T]) -> T | None:
    """`value`, an instance of `kind` or None. Raises TypeError. Spec 3.1."""
    return None if value is None else check_type(name, value, kind)


def check_object(name: str, value: object, kind: type[T]) -> T:
    """`value`, an instance of `kind`, where None is the AttributeError that programs know.

    Raises TypeError for any other type. Spec 10, row 39.
    """
    if value is None:
        raise AttributeError(f"{name} is None: pass a {kind.__name__}")
    return check_type(name, value, kind)


def out_of_range(text: str) -> ValueError:
    """Of a number that an argument cannot be; programs may look for the very type."""
    error = ValueError(text)
    error._is_of_check = True  # type: ignore[attr-defined]
    return error


def is_of_check(error: BaseException | None) -> bool:
    """Whether it is `out_of_range`, and no ValueError of a signal's handler."""
    return getattr(error, "_is_of_check", False)


def check_int(name: str, value: object, low: int, high: int) -> int:
    """`value`, an int of [low, high]. Raises TypeError, ValueError. Spec 3.1."""
    number = check_type(name, value, int)
    if not low <= number <= high:
        raise out_of_range(f"{name} must be in [{low}, {high}], got {number}")
    return number


def check_uint8(name: str, value: object) -> int:
    """`value`, an int of 8 bits without sign. Raises TypeError, ValueError. Spec 3.1."""
    return check_int(name, value, 0, UINT8_MAX)


def check_uint16(name: str, value: object) -> int:
    """`value`, an int of 16 bits without sign. Raises TypeError, ValueError. Spec 3.1."""
    return check_int(name, value, 0, UINT16_MAX)


def check_uint32(name: str, value: object) -> int:
    """`value`, an int of 32 bits without sign. Raises TypeError, ValueError. Spec 3.1."""
    return check_int(name, value, 0, UINT32_MAX)


def check_size(size: object) -> int:
    """A number of bytes to move; -1 stands for all that there are. Spec 6.8, 6.9."""
    nbytes = check_int64("size", size)
    if nbytes != -1 and nbytes <= 0:
        raise invalid(f"size must be -1 or greater than 0, got {nbytes}")
    return nbytes


def check_uint64(name: str, value: object) -> int:
    """`value`, an int of 64 bits without sign. Raises TypeError, ValueError. Spec 3.1."""
    return check_int(name, value, 0, UINT64_MAX)


def check_int32(name: str, value: object) -> int:
    """`value`, an int of 32 bits with sign. Raises TypeError, ValueError. Spec 3.1."""
    return check_int(name, value, -INT32_MAX - 1, INT32_MAX)


def check_int64(name: str, value: object) -> int:
    """`value`, an int of 64 bits with sign. Raises TypeError, ValueError. Spec 3.1."""
    return check_int(name, value, -INT64_MAX - 1, INT64_MAX)


def check_list(name: str, value: object, inner: type[T]) -> list[T]:
    """`value`, a list (no tuple) of `inner`. Raises TypeError. Spec 3.1."""
    values: list[T] = check_type(name, value, list)
    _check_inner(name, values, inner)
    return values


def check_sequence(name: str, value: object, inner: type[T]) -> list[T] | tuple[T, ...]:
    """`value`, a list or tuple of `inner`. Raises TypeError. Spec 3.1."""
    values: list[T] | tuple[T, ...] = check_type(name, value, list, tuple)
    _check_inner(name, values, inner)
    return values


def check_uint64_sequence(name: str, value: object) -> list[int] | tuple[int, ...]:
    """`value`, a list or tuple of uint64. Raises TypeError, ValueError. Spec 3.1."""
    return _check_span(name, check_sequence(name, value, int), 0, UINT64_MAX)


def check_int64_sequence(name: str, value: object) -> list[int] | tuple[int, ...]:
    """`value`, a list or tuple of int64. Raises TypeError, ValueError. Spec 3.1."""
    return _check_span(name, check_sequence(name, value, int), -INT64_MAX - 1, INT64_MAX)


def check_dict(name: str, value: object, key: type[T], item: type[U]) -> dict[T, U]:
    """`value`, a dict from `key` to `item`. Raises TypeError. Spec 3.1."""
    mapping: dict[T, U] = check_type(name, value, dict)
    _check_inner(f"{name} (keys)", tuple(mapping), key)
    _check_inner(f"{name} (values)", tuple(mapping.values()), item)
    return mapping


def check_json_object(name: str, text: str) -> dict[str, object]:
    """What `text` says, a JSON object. Raises LLMException. Spec 7.2, 8.1."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid(f"{name} is no JSON ({error}): {describe(text)}") from None
    if not isinstance(value, dict):
        raise invalid(f"{name} must be a JSON object, got {describe(value)}")
    return value


def parse_number(name: str, text: str, allowed: range) -> int:
    """The number that an option's text is, one of `allowed`. Raises LLMException."""
    if not is_number(text) or int(text) not in allowed:
        raise invalid(
            f"{name} must be a number of [{allowed.start}, {allowed.stop - 1}], got {text!r}"
        )
    return int(text)


def is_number(text: str) -> bool:
    """Whether it is digits alone, not too many to be read."""
    # 20 digits hold every uint64; Python refuses to read texts of thousands of them
    return text.isascii() and text.isdigit() and len(text) <= 20


def describe(value: object) -> str:
    """`value` and its type, cut to a length that fits into a message."""
    return "None" if value is None else f"{reprlib.repr(value)} ({type(value).__name__})"


def _is_kind(given: type, kinds: tuple[type, ...]) -> bool:
    return issubclass(given, kinds) and (given is not bool or bool in kinds)


def _names(kinds: tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in kinds)


def _check_inner(name: str, values: Sequence[Any], inner: type) -> None:
    # Block lists are long and their types few: one pass in C, then one look per type.
    for given in set(map(type, values)):
        if given is not inner and not _is_kind(given, (inner,)):
            stray = next(value for value in values if type(value) is given)
            raise TypeError(
                f"{name}: inner type only supports {inner.__name__}, got {describe(stray)}"
            )


_Ints = TypeVar("_Ints", bound="Sequence[int]")


def _check_span(name: str, values: _Ints, low: int, high: int) -> _Ints:
    if values and not (low <= min(values) and max(values) <= high):
        for index, value in enumerate(values):
            check_int(f"{name}[{index}]", value, low, high)
    return values
