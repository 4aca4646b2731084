"""What the scheduler tells the workers in one step of the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.integrations.vllm.handover import Handover, Lease, Named


@dataclass(frozen=True)
class Grant:
    """A lease that begins, and the key that proves what is said of it."""

    lease: Lease
    key: bytes


@dataclass(frozen=True)
class Announcement:
    """A prompt under a lease that may be read while it is computed, and its name."""

    lease: Lease
    transfer_id: str
    num_tokens: int
    digest: str


@dataclass(frozen=True)
class Chunk:
    """What a step computes of a prompt that was announced."""

    lease: Lease
    #: by group, behind those of the chunks before; empty if there are none
    more_blocks: Sequence[Sequence[int]]
    #: of the prompt's tokens, how many are computed when the step is
    stop: int


@dataclass(frozen=True)
class Pull:
    """Blocks of one request to be read."""

    request_id: str
    source: Handover | Named
    #: by KV cache group, of all tokens of the request
    dst_blocks: Sequence[Sequence[int]]
    #: the first tokens, which are here already
    num_computed_tokens: int


@dataclass
class Step:
    """Of a producer `drops` to `holds`, done in this order; of a consumer the rest."""

    #: leases of requests that came to nothing
    drops: list[Lease] = field(default_factory=list)
    #: leases that begin, before anyone can know of them
    grants: list[Grant] = field(default_factory=list)
    #: of those, prompts that may be read while they are computed; and what the step computes
    announcements: list[Announcement] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    #: finished requests whose blocks are kept until they were read, or the lease ends
    holds: dict[str, Lease] = field(default_factory=dict)
    #: what will be read, and must be kept there until it is
    expected: list[Handover | Named] = field(default_factory=list)
    pulls: list[Pull] = field(default_factory=list)
    #: what is not needed any more, or not after all
    releases: list[Handover | Named] = field(default_factory=list)
    #: requests that were given up while they are read
    cancels: list[str] = field(default_factory=list)
