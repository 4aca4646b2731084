"""Fetches: how the pieces of a push are named in a `Fetch`, and what is taken of such names.

Segments are three columns. Combs are the columns of their places and of their teeth: with small
pieces that is a hundredth, and the receiver reads them as it does those of its own pulls. What a
peer names is taken only as a plan could have made it: few enough teeth, few enough bytes, none on
another, no offset that wraps around. Where the pieces lie is for the owner of the cache to check.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llm_datadist.core.combs import Combs, Teeth
from llm_datadist.core.messages import (
    MAX_COMB_NBYTES,
    MAX_REQUEST_SEGMENTS,
    MAX_TEETH,
    ProtocolError,
)
from llm_datadist.core.packed import columns_of, pack_columns
from llm_datadist.core.segments import Segments

if TYPE_CHECKING:
    from llm_datadist.core.combs import Pieces
    from llm_datadist.core.messages import Fetch
    from llm_datadist.core.segments import U64

#: no tensor is longer, so no offset is larger
_MOST_OFFSET = 2**63


class Names(NamedTuple):
    """The fields of a `Fetch` that name pieces."""

    columns: bytes
    teeth: bytes = b""
    tooth_nbytes: int = 0


def names_of(pieces: Pieces) -> Names:
    """At most MAX_REQUEST_SEGMENTS pieces."""
    if not isinstance(pieces, Combs):
        pieces = pieces.flat()
        return Names(pack_columns(pieces.src, pieces.dst, pieces.nbytes))
    combs = pieces.from_lowest()
    teeth = combs.teeth
    return Names(
        pack_columns(combs.src, combs.dst), pack_columns(teeth.src, teeth.dst), teeth.nbytes
    )


def pieces_of(request: Fetch) -> Pieces:
    """What a peer names. Raises ProtocolError for what cannot be meant."""
    if not request.teeth and not request.tooth_nbytes:
        return Segments(*columns_of(request.columns, 3))
    src, dst = columns_of(request.columns, 2)
    offsets = columns_of(request.teeth, 2)
    teeth = Teeth(offsets[0], offsets[1], request.tooth_nbytes)
    if not (
        0 < len(teeth) <= MAX_TEETH
        and 0 < len(src) * len(teeth) <= MAX_REQUEST_SEGMENTS
        and 0 < len(teeth) * teeth.nbytes <= MAX_COMB_NBYTES
    ):
        raise ProtocolError(
            f"{len(src)} combs of {len(teeth)} teeth of {teeth.nbytes} bytes are none of a push"
        )
    if not (_are_apart(teeth.src, teeth.nbytes) and _are_apart(np.sort(teeth.dst), teeth.nbytes)):
        raise ProtocolError("a comb has teeth that lie on each other, or out of order")
    return Combs(src, dst, teeth)


def _are_apart(offsets: U64, nbytes: int) -> bool:
    """Whether each of these pieces ends before the next begins, and the last where it can."""
    if int(offsets.max()) > _MOST_OFFSET - nbytes:
        return False
    steps = np.diff(offsets.view(np.int64))  # none is out of its range by now
    return bool((steps >= nbytes).all())
