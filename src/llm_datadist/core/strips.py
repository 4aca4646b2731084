"""Strips: the tokens of a request, cut wherever a block ends on either side."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from llm_datadist.core.segments import U64, Segments
from llm_datadist.errors import invalid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.kv_layout import KVLayout

#: which tokens of a sequence: so many from 0 on, or these; None: all that both lists of blocks hold
Tokens: TypeAlias = "int | range | None"


def strips_of(
    src: KVLayout,
    src_blocks: Sequence[int],
    dst: KVLayout,
    dst_blocks: Sequence[int],
    tokens: Tokens,
) -> Segments:
    """Tokens that lie in one block on either side: the offsets of the first, and how many.

    Raises LLMException (LLM_PARAM_INVALID), as `Pattern.segments` does.
    """
    span = _span(src, src_blocks, dst, dst_blocks, tokens)
    bounds = [
        np.arange(span.start - span.start % n + n, span.stop, n, dtype=np.int64)
        for n in (src.block_tokens, dst.block_tokens)
    ]
    cuts = np.sort(np.concatenate(([span.start], *bounds, [span.stop])))
    counts = np.diff(cuts)
    starts = cuts[:-1][counts > 0]
    return Segments(
        _offsets(src, src_blocks, starts, span.start),
        _offsets(dst, dst_blocks, starts, span.start),
        counts[counts > 0].astype(np.uint64),
    )


def _span(
    src: KVLayout,
    src_blocks: Sequence[int],
    dst: KVLayout,
    dst_blocks: Sequence[int],
    tokens: Tokens,
) -> range:
    """The tokens that are meant, if they lie in just these blocks."""
    ends = ("source", src, src_blocks), ("destination", dst, dst_blocks)
    if tokens is None:
        tokens = min(len(blocks) * layout.block_tokens for _, layout, blocks in ends)
    span = tokens if isinstance(tokens, range) else range(tokens)
    if not span or span.step != 1 or span.start < 0:
        raise invalid(f"tokens must be one at least, and count up by 1 from 0 or more: {tokens}")
    for whose, layout, blocks in ends:
        size = layout.block_tokens
        wanted = -(-span.stop // size) - span.start // size
        if len(blocks) != wanted:
            raise invalid(
                f"axis N (tokens of a block): tokens {span.start} to {span.stop - 1} lie in "
                f"{wanted} blocks of the {whose}, of {size} tokens each, and it names {len(blocks)}"
            )
        if min(blocks) < 0 or max(blocks) >= layout.num_blocks:
            raise invalid(
                f"axis B (blocks): the {whose} has blocks 0 to {layout.num_blocks - 1}, and "
                f"{min(blocks)} to {max(blocks)} are named"
            )
    return span


def _offsets(
    layout: KVLayout, blocks: Sequence[int], tokens: npt.NDArray[np.int64], first: int
) -> U64:
    """How far into a plane these tokens of a sequence lie; the first block has token `first`."""
    size = layout.block_tokens
    at = np.asarray(blocks, dtype=np.uint64)[tokens // size - first // size]
    inside = (tokens % size).astype(np.uint64)
    return at * np.uint64(layout.stride("B")) + inside * np.uint64(layout.stride("N"))
