"""Actions: what the state machine of a link (`link.py`) has its session carry out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from llm_datadist.core import messages as m
    from llm_datadist.errors import LLMStatusCode


@dataclass(frozen=True, slots=True)
class Send:
    message: m.Message


@dataclass(frozen=True, slots=True)
class Probe:
    """Verify `path` end to end, then report `probed`."""

    path: str


@dataclass(frozen=True, slots=True)
class Meet:
    """Link to the peer over its same-host socket, then report `met`."""

    offer: bytes


@dataclass(frozen=True, slots=True)
class Publish:
    """The link may be used from here on."""

    path: str


@dataclass(frozen=True, slots=True)
class Dial:
    """Open `count` streams on which the peer makes the requests."""

    count: int


@dataclass(frozen=True, slots=True)
class SayWhether:
    """Tell the peer whether this connection is one of ours."""

    connection: bytes


@dataclass(frozen=True, slots=True)
class Learn:
    """The peer said whether a connection is its own."""

    connection: bytes
    is_theirs: bool


@dataclass(frozen=True, slots=True)
class Drain:
    """The peer unlinks: let running transfers end, then report `drained`."""


@dataclass(frozen=True, slots=True)
class Retract:
    """The link may not be used any more, though it has not ended yet."""


@dataclass(frozen=True, slots=True)
class Close:
    """The end of this link, with the reason why."""

    status: LLMStatusCode
    reason: str
    #: both ends have drained it
    is_agreed: bool = False


Action: TypeAlias = (
    Send | Probe | Meet | Publish | Dial | SayWhether | Learn | Drain | Retract | Close
)
