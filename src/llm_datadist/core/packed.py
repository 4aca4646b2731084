"""What messages carry as bytes of one field: columns of numbers, and the names of layers.

Tens of thousands of numbers are one field, which is made and read as a numpy array.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import numpy as np
from msgspec import Meta

from llm_datadist.core.messages import (
    MAX_LAYERS,
    MAX_LAYERS_NBYTES,
    MAX_REQUEST_SEGMENTS,
    ProtocolError,
    Text,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.core.segments import U64

#: segments are listed in columns of these
_COLUMN: Final = np.dtype("<u8")
_layers_decoder: msgspec.msgpack.Decoder[list[int | str]] = msgspec.msgpack.Decoder(
    Annotated[list[int | Text], Meta(min_length=1, max_length=MAX_LAYERS)]
)


def columns_of(data: bytes, count: int) -> list[U64]:
    """The `count` equal columns in which a request lists segments. Raises ProtocolError."""
    if len(data) % (8 * count) or len(data) > 8 * count * MAX_REQUEST_SEGMENTS:
        raise ProtocolError(f"{len(data)} bytes are no {count} columns of segments")
    each = len(data) // (8 * count)
    return [np.frombuffer(data, _COLUMN, each, 8 * each * number) for number in range(count)]


def pack_columns(*columns: U64) -> bytes:
    """The reverse of `columns_of`."""
    return np.concatenate(columns).astype(_COLUMN, copy=False).tobytes()


def pack_vectors(vectors: U64) -> bytes:
    """The columns of (address, length) pairs."""
    return vectors.T.astype(_COLUMN, copy=False).tobytes()


def pack_layers(names: Sequence[int | str]) -> bytes:
    """The names of layers, in order. Raises ValueError for what `layers_of` does not take."""
    try:
        packed = msgspec.msgpack.encode(tuple(names))
        layers_of(packed)
    except (OverflowError, ProtocolError) as error:
        raise ValueError(str(error)) from error
    if len(packed) > MAX_LAYERS_NBYTES:
        raise ValueError(f"{len(packed)} bytes of names, {MAX_LAYERS_NBYTES} are possible")
    return packed


def layers_of(data: bytes) -> list[int | str]:
    """The reverse of `pack_layers`. Raises ProtocolError."""
    try:
        return _layers_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"no names of layers: {error}") from error
