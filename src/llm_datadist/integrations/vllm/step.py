"""What the scheduler tells the workers in one step of the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.integrations.vllm.handover import Handover, Lease


@dataclass(frozen=True)
class Grant:
    """A lease that begins, and the key that proves what is said of it."""

    lease: Lease
    key: bytes


@dataclass(frozen=True)
class Pull:
    """Blocks of one request to be read."""

    request_id: str
    source: Handover
    #: by KV cache group, of all tokens of the request
    dst_blocks: Sequence[Sequence[int]]
    #: the first tokens, which are here already
    num_computed_tokens: int


@dataclass
class Step:
    """Of a producer `drops`, `grants`, `holds`, done in this order; of a consumer the rest."""

    #: leases of requests that came to nothing
    drops: list[Lease] = field(default_factory=list)
    #: leases that begin, before anyone can know of them
    grants: list[Grant] = field(default_factory=list)
    #: finished requests whose blocks are kept until they were read, or the lease ends
    holds: dict[str, Lease] = field(default_factory=dict)
    #: what will be read, and must be kept there until it is
    expected: list[Handover] = field(default_factory=list)
    pulls: list[Pull] = field(default_factory=list)
    #: what is not needed any more, or not after all
    releases: list[Handover] = field(default_factory=list)
