"""Arbitrary messages of every type, made from the types' own field descriptions."""

from __future__ import annotations

from typing import Any, get_args

import msgspec.inspect as mi
from hypothesis import strategies as st

from llm_datadist.core import messages as m
from llm_datadist.core.words import printable

MESSAGE_TYPES: tuple[type[m.Message], ...] = get_args(m.AnyMessage)

SHORT = 40


def values_of(kind: mi.Type) -> st.SearchStrategy[Any]:
    """Values that msgspec accepts for a type."""
    match kind:
        case mi.IntType(ge=None):
            return st.integers(-3, 3) | st.integers(-(2**63), 2**63 - 1)
        case mi.IntType(ge=int(low), le=high):
            last = 2**64 - 1 if high is None else high
            return st.integers(low, min(low + 3, last)) | st.integers(low, last)
        case mi.StrType(max_length=limit):
            # what does not print is another text behind the wire: test_words_of_peers.py
            texts = st.text(max_size=SHORT if limit is None else min(SHORT, limit))
            return texts.map(lambda text: printable(text)[:limit])
        case mi.BytesType(min_length=low, max_length=high):
            return st.binary(min_size=low or 0, max_size=SHORT if high is None else high)
        case mi.BoolType():
            return st.booleans()
        case mi.FloatType(ge=low, le=high):
            return st.floats(low, high, allow_nan=False)  # which is not even equal to itself
        case mi.NoneType():
            return st.none()
        case mi.UnionType(types=types):
            return st.one_of(*map(values_of, types))
        case mi.TupleType(item_types=types):
            return st.tuples(*map(values_of, types))
        case mi.VarTupleType(item_type=item, min_length=low, max_length=high):
            most = max(low or 0, 3 if high is None else min(3, high))
            return st.lists(values_of(item), min_size=low or 0, max_size=most).map(tuple)
        case mi.ListType(item_type=item, min_length=low):
            return st.lists(values_of(item), min_size=low or 0, max_size=max(low or 0, 3))
        case mi.DictType(key_type=key, value_type=value):
            return st.dictionaries(values_of(key), values_of(value), max_size=3)
        case mi.StructType(cls=cls, fields=fields):
            return st.builds(cls, **{field.name: values_of(field.type) for field in fields})
    raise AssertionError(f"no strategy for {kind}")


def messages_of(kind: type[m.Message]) -> st.SearchStrategy[Any]:
    return values_of(mi.type_info(kind))


messages: st.SearchStrategy[m.Message] = st.one_of(*map(messages_of, MESSAGE_TYPES))
