"""What the scheduler tells the workers in one step of the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_datadist.integrations.vllm.handover import Handover, Lease


@dataclass(frozen=True)
class Pull:
    """Blocks of one request to be read, block by block."""

    request_id: str
    source: Handover
    src_blocks: list[int]
    dst_blocks: list[int]


@dataclass
class Step:
    """Of a producer `drops`, `grants`, `holds`, done in this order; of a consumer the rest."""

    #: leases of requests that came to nothing
    drops: list[Lease] = field(default_factory=list)
    #: leases that begin, before anyone can know of them
    grants: list[Lease] = field(default_factory=list)
    #: finished requests whose blocks are kept until they were read, or the lease ends
    holds: dict[str, Lease] = field(default_factory=dict)
    #: producers that will be read from
    expected: list[Handover] = field(default_factory=list)
    pulls: list[Pull] = field(default_factory=list)
    #: what is waiting here, and must be kept there
    renewals: list[Handover] = field(default_factory=list)
    #: what is not needed after all
    releases: list[Handover] = field(default_factory=list)
