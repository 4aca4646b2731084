"""What a check takes, and what it says."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from llm_datadist.endpoint import Endpoint


#: what programs read
Data: TypeAlias = "Mapping[str, str | int | float | bool]"


class State(str, Enum):
    """How it stands with one thing."""

    OK = "ok"
    NOTE = "note"  #: good to know; nothing has to be mended
    UNAVAILABLE = "unavailable"  #: it is not there, and nothing is wrong with that
    PROBLEM = "problem"  #: something will not work, or be slow or unsafe, until it is mended


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    name: str
    state: State
    found: str
    remedy: str = ""  #: what to do, in a line
    data: Data = field(default_factory=dict)  #: the same for programs


@dataclass(frozen=True, slots=True)
class Case:
    """What the doctor was asked to look at, besides this process and its environment."""

    listen: Endpoint | None = None
    peer: Endpoint | None = None


Check: TypeAlias = "Callable[[Case], Iterable[Finding]]"
