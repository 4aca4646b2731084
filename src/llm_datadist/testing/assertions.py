"""Assertions on the bytes of caches, whose messages name the tensor, the block and the byte.

    assert_cache_equal(cache, expected)  # all of it
    assert_cache_equal(cache, theirs[:, [3, 7]], blocks=[0, 5])  # the blocks that were pulled
    assert_untouched(cache, before, except_blocks=[0, 5])  # and no others

What they compare: a cache of this process, or arrays, one per tensor, of any element type. Dim 0 of
each counts the blocks, or the batch rows of a continuous cache.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from llm_datadist.cache import Cache
from llm_datadist.memory.host import unmapped

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Bytes = npt.NDArray[np.uint8]
#: a cache's tensors: a cache of this process, one array of them all, or one array each
Tensors: TypeAlias = "Cache | npt.NDArray[Any] | Sequence[npt.NDArray[Any]]"

_MAX_NAMED = 8


def bytes_of(tensors: Tensors) -> Bytes:
    """A copy of the bytes of all tensors: [tensors, blocks or rows, bytes].

    Raises ValueError for a cache whose memory is gone, and for tensors of different sizes.
    """
    if isinstance(tensors, Cache):
        return _memory_of(tensors)
    arrays = [np.asarray(tensor) for tensor in tensors]
    if not arrays or any(array.ndim == 0 or not array.size for array in arrays):
        raise ValueError("there must be one array per tensor, whose dim 0 counts the blocks")
    if len({(len(array), array.nbytes) for array in arrays}) > 1:
        raise ValueError(f"the tensors differ in size: {[array.shape for array in arrays]}")
    rows = [np.ascontiguousarray(array).reshape(len(array), -1) for array in arrays]
    return np.stack([row.view(np.uint8) for row in rows])


def assert_cache_equal(
    actual: Tensors, expected: Tensors, *, blocks: Sequence[int] | None = None
) -> None:
    """Fails unless every tensor of `actual` holds the bytes of `expected`.

    With `blocks`, only these blocks of `actual` are looked at, and `expected` has as many: its
    block `i` belongs to block `blocks[i]`. Raises ValueError for what cannot be compared: other
    numbers of tensors or blocks, other sizes of blocks.
    """
    __tracebackhide__ = True
    ours, theirs = bytes_of(actual), bytes_of(expected)
    numbers = list(range(ours.shape[1])) if blocks is None else list(blocks)
    _compare(actual, ours, theirs, numbers)


def assert_untouched(after: Tensors, before: Tensors, *, except_blocks: Iterable[int] = ()) -> None:
    """Fails when a block other than `except_blocks` differs from `before`, in any tensor.

    `before` is what `bytes_of` returned earlier, or any tensors of the same size.
    """
    __tracebackhide__ = True
    ours, theirs = bytes_of(after), bytes_of(before)
    _check_shape(ours, theirs)
    others = sorted(set(range(ours.shape[1])) - set(except_blocks))
    _compare(after, ours, theirs[:, others], others)


def _memory_of(cache: Cache) -> Bytes:
    addrs, desc = cache.tensor_addrs, cache.cache_desc
    if not addrs:
        raise ValueError(f"cache {cache.cache_id} has no memory: it was deallocated")
    if gone := unmapped(addrs, desc.size):
        raise ValueError(
            f"tensor {addrs.index(gone[0])} of cache {cache.cache_id} lies at {gone[0]:#x}, which "
            "is not mapped in this process: compare the cache where it lives, or its bytes"
        )
    tensors = [np.frombuffer(ctypes.string_at(addr, desc.size), np.uint8) for addr in addrs]
    return np.stack(tensors).reshape(len(addrs), desc.shape[0], -1)


def _compare(actual: Tensors, ours: Bytes, theirs: Bytes, numbers: Sequence[int]) -> None:
    """Compares the blocks of these numbers of `ours` with all of `theirs`."""
    __tracebackhide__ = True
    if outside := [number for number in numbers if not 0 <= number < ours.shape[1]]:
        raise ValueError(f"there are no blocks {outside}: {_name(actual)} has {_size(ours)}")
    ours = ours[:, list(numbers)]
    _check_shape(ours, theirs)
    differs = ours != theirs
    if differs.any():
        raise AssertionError(_description(actual, ours, theirs, differs, numbers))


def _description(
    actual: Tensors,
    ours: Bytes,
    theirs: Bytes,
    differs: npt.NDArray[np.bool_],
    numbers: Sequence[int],
) -> str:
    what = "row" if isinstance(actual, Cache) and not actual.is_blocks_cache else "block"
    tensor, index, byte = (int(position) for position in np.argwhere(differs)[0])
    bad = [f"tensor {t} {what} {numbers[i]}" for t, i in np.argwhere(differs.any(axis=2))]
    named = ", ".join(bad[:_MAX_NAMED]) + (", ..." if len(bad) > _MAX_NAMED else "")
    return (
        f"{_name(actual)} differs: tensor {tensor}, {what} {numbers[index]}, byte {byte} is "
        f"{ours[tensor, index, byte]:#04x}, expected {theirs[tensor, index, byte]:#04x}\n"
        f"{np.count_nonzero(differs)} of {differs.size} bytes differ, in {len(bad)} of "
        f"{differs.shape[0] * differs.shape[1]} {what}s: {named}"
    )


def _check_shape(ours: Bytes, theirs: Bytes) -> None:
    if ours.shape != theirs.shape:
        raise ValueError(f"cannot compare {_size(ours)} with expected {_size(theirs)}")


def _name(actual: Tensors) -> str:
    return f"cache {actual.cache_id}" if isinstance(actual, Cache) else "the array"


def _size(array: Bytes) -> str:
    tensors, blocks, nbytes = array.shape
    return f"{tensors} tensors of {blocks} blocks of {nbytes} bytes"
