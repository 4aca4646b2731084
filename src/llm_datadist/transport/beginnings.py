"""What the first bytes of a connection say of how its other end is secured.

A caller speaks first, so a listener sees what the caller has. One that is set up differently says
what it has itself, in eight bytes that belong to none of the hand-shakes, and closes: then both
ends know that their link security differs, and how. A stranger learns no more from that than from
the listener's silence, which differs between them as well.
"""

from __future__ import annotations

import enum
from typing import Final

from llm_datadist.core import messages as m


class Kind(enum.Enum):
    """A kind of link security. The value is its word on the wire."""

    OPEN = b"LDHAVES0"
    SECRET = b"LDHAVES1"
    TLS = b"LDHAVES2"


#: how messages call each
_NAMES: Final = {Kind.OPEN: "no link security", Kind.SECRET: "a shared secret", Kind.TLS: "TLS"}
_MAGIC: Final = m.HEADER.pack(m.MAGIC, 0)[:4]
#: without the digit of its version
_SECRET: Final = b"LDSECRT"
#: records of TLS, the first ones: a hand-shake's, and an alert
_TLS: Final = (b"\x16\x03", b"\x15\x03")


def why_to_leave(came: bytes | bytearray, ours: Kind) -> str:
    """Why who answered so cannot be linked to; empty if it may go on."""
    for kind in Kind:
        if came.startswith(kind.value):
            return _differ(kind, ours)
    other = (
        "" if ours is Kind.OPEN else m.other_protocol(came)
    )  # there it is no frame, which says so
    return other and f"{other} is spoken there: it is the port of something else"


def why_to_refuse(came: bytes | bytearray, ours: Kind) -> str:
    """Why who begins so cannot link here; empty if it begins as `ours` do.

    Where ours have no security, empty for what begins like nothing known, too: that is no frame.
    """
    theirs = _kind_of(came)
    if theirs is ours or (theirs is None and ours is Kind.OPEN):
        return ""
    return "it does not begin like a cluster" if theirs is None else _differ(theirs, ours)


def _kind_of(came: bytes | bytearray) -> Kind | None:
    if came.startswith(_MAGIC):
        return Kind.OPEN
    if came.startswith(_SECRET):
        return Kind.SECRET
    return Kind.TLS if came.startswith(_TLS) else None


def _differ(theirs: Kind, ours: Kind) -> str:
    return f"the peer has {_NAMES[theirs]}, and this end has {_NAMES[ours]}"
