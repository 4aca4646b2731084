"""What the command line decides, as one value for both workers."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_datadist.cli.demo.model_source import ModelSource

#: more threads make a model of this size slower, not faster
_MOST_THREADS = 8


class LinkPath(str, Enum):
    """How the blocks travel."""

    AUTO = "auto"
    CMA = "cma"
    TCP = "tcp"


def half_of_the_cores() -> int:
    """Threads for one worker, so that prefill and decode have a core each to overlap on."""
    return max(1, min(len(os.sched_getaffinity(0)) // 2, _MOST_THREADS))


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of one run."""

    model: ModelSource
    max_new_tokens: int
    block_tokens: int
    port: int
    path: LinkPath
    #: The same number in every process: it decides how sums are split, and with that the last bits
    #: of the logits.
    num_threads: int = field(default_factory=half_of_the_cores)
