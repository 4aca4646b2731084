"""Plans: two layouts and which parts of them are meant -> Segments, or a refusal with its status.

Everything here is arithmetic on numpy columns; no step loops over blocks. The rules are those of
spec 6.9-6.11 with the decisions of section 11: unequal block sizes are refused (O12), and a row is
cut into blocks by its own length, not by the tensor's (O11).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from llm_datadist.core.segments import AT_ONCE, FEW, U64, Segments, listed
from llm_datadist.core.tiled import Tiled
from llm_datadist.errors import invalid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.core.geometry import Geometry, Layout


NOTHING: Final = Segments.few([], [], [])


def check_batch_rows(geometry: Geometry, nbytes: int, whose: str, offset: int = 0) -> None:
    """One side of a copy by rows has rows, and they hold `nbytes` behind `offset`. Spec 6.9."""
    if not geometry.has_batch_rows:
        raise invalid(f"the {whose} is a blocks cache: use pull_blocks with a BlocksCacheKey")
    if offset >= geometry.row_nbytes:
        raise invalid(
            f"offset {offset} lies behind the {whose}'s rows of {geometry.row_nbytes} bytes"
        )
    if nbytes > geometry.row_nbytes - offset:
        raise invalid(
            f"{nbytes} bytes are more than the {whose}'s rows have behind offset {offset}, "
            f"{geometry.row_nbytes - offset}: make those rows as large, or size smaller"
        )


def row_to_row(
    src: Layout,
    src_row: int,
    dst: Layout,
    dst_row: int,
    nbytes: int,
    *,
    src_offset: int = 0,
    dst_offset: int = 0,
) -> Segments:
    """`nbytes` of one batch row into another, tensor by tensor, each behind its offset."""
    src_start = np.uint64(src_row * src.geometry.row_nbytes + src_offset)
    dst_start = np.uint64(dst_row * dst.geometry.row_nbytes + dst_offset)
    # not merged where tensors touch: peers check that each segment lies within one tensor
    lengths = np.full(len(src.addrs), nbytes, dtype=np.uint64)
    return Segments(src.addrs + src_start, dst.addrs + dst_start, lengths)


def check_blocks(geometry: Geometry, blocks: Sequence[int], whose: str) -> None:
    """Every index names a block of this cache."""
    if not geometry.has_blocks:
        raise invalid(f"the {whose} is no blocks cache")
    if min(blocks) < 0 or max(blocks) >= geometry.num_rows:
        raise invalid(
            f"block indices {min(blocks)} to {max(blocks)} are out of range: "
            f"the {whose} has {geometry.num_rows} blocks"
        )


def blocks_to_blocks(
    src: Layout, src_blocks: Sequence[int], dst: Layout, dst_blocks: Sequence[int]
) -> Segments | Tiled:
    """Block src_blocks[j] to block dst_blocks[j] of every tensor; runs are merged. Spec 6.10.

    When a destination block is named twice, which source it ends with is not defined.
    """
    if len(src_blocks) != len(dst_blocks):
        raise invalid(f"{len(src_blocks)} source blocks do not pair with {len(dst_blocks)}")
    nbytes = src.geometry.row_nbytes
    if nbytes != dst.geometry.row_nbytes:
        raise invalid(
            f"source blocks have {nbytes} bytes, destination blocks {dst.geometry.row_nbytes}"
        )
    if len(src_blocks) == 1 and len(src.addrs) <= FEW:
        src_start, dst_start = src_blocks[0] * nbytes, dst_blocks[0] * nbytes
        return Segments.few(
            [addr + src_start for addr in src.addrs.tolist()],
            [addr + dst_start for addr in dst.addrs.tolist()],
            [nbytes] * len(src.addrs),
        )
    runs = _runs(_offsets(src_blocks, nbytes), _offsets(dst_blocks, nbytes), nbytes)
    if len(runs.nbytes) * len(src.addrs) > AT_ONCE:
        return Tiled(src.addrs, dst.addrs, runs)
    return listed(src.addrs, dst.addrs, runs)


def row_to_blocks(src: Layout, src_row: int, dst: Layout, dst_blocks: Sequence[int]) -> Tiled:
    """Chunk j of a batch row to block dst_blocks[j] of every tensor. Spec 6.10, O11.

    The last chunk of a row may be shorter than a block; the block's bytes behind it stay.
    """
    block, row = dst.geometry.row_nbytes, src.geometry.row_nbytes
    if block > row:
        raise invalid(f"a block of {block} bytes is larger than the source's rows of {row}")
    if len(dst_blocks) > -(-row // block):
        raise invalid(
            f"{len(dst_blocks)} blocks of {block} bytes are more than a row of {row} bytes fills"
        )
    chunks = np.arange(len(dst_blocks), dtype=np.uint64) * np.uint64(block)
    lengths = np.minimum(np.uint64(block), np.uint64(row) - chunks)
    src_offsets = chunks + np.uint64(src_row * row)
    pairs = Segments(src_offsets, _offsets(dst_blocks, block), lengths).coalesced()
    return Tiled(src.addrs, dst.addrs, pairs)


def _offsets(blocks: Sequence[int], nbytes: int) -> U64:
    return np.asarray(blocks, dtype=np.uint64) * np.uint64(nbytes)


def _runs(src: U64, dst: U64, nbytes: int) -> Segments:
    """Merges pairs whose two offsets both grow by one block; sorts first, so that order is free."""
    order = np.lexsort((src, dst - src))
    lengths = np.full(len(src), nbytes, dtype=np.uint64)
    return Segments(src[order], dst[order], lengths).coalesced()
