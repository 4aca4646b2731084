"""What the parent and its two workers say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from llm_datadist.cli.demo.prompts import Prompt

Role: TypeAlias = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Loading:
    """Worker to parent: how far the model is loaded, from 0 to 1."""

    role: Role
    fraction: float
    doing: str


@dataclass(frozen=True, slots=True)
class Ready:
    """Worker to parent: the model is loaded and the cache registered. `port`: 0 at decode."""

    role: Role
    port: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Worker to parent: it ends, and why. `details` is a traceback, or nothing."""

    message: str
    exit_code: int
    details: str = ""


@dataclass(frozen=True, slots=True)
class Link:
    """Parent to decode: where prefill listens."""

    port: int


@dataclass(frozen=True, slots=True)
class Linked:
    """Decode to parent: the path of the link, and why it is no faster one ("" when it is)."""

    path: str
    path_reason: str


@dataclass(frozen=True, slots=True)
class Compute:
    """Parent to prefill: the request as the user made it."""

    request_id: int
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class HandOver:
    """Prefill to parent to decode: all that decode learns of a request. No text, no prompt ids."""

    request_id: int
    num_tokens: int
    num_blocks: int
    #: a KVHandle as JSON: the parent passes it on, and needs no torch for that
    handle: str
    first_token: int


@dataclass(frozen=True, slots=True)
class Pulled:
    """Decode to parent: the blocks are here, so prefill may free its own."""

    request_id: int
    nbytes: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Free:
    """Parent to prefill: nobody reads this request's blocks any more."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Token:
    """Decode to parent: one more token, and the text it completes (which may be none yet)."""

    request_id: int
    token: int
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """Decode to parent: the answer is complete."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Generate:
    """Parent to prefill: answer this request again, all alone.."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Generated:
    """Prefill to parent: what plain generation in one process answers."""

    request_id: int
    tokens: tuple[int, ...]


ToParent: TypeAlias = (
    Loading | Ready | Failed | Linked | HandOver | Pulled | Token | Finished | Generated
)
ToWorker: TypeAlias = Link | Compute | HandOver | Free | Generate
