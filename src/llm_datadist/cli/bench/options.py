"""What the options of `bench` and its sub-verbs have in common."""

# No `from __future__ import annotations`: typer reads the types when it runs.

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from llm_datadist.cli.failure import SetupError


class LinkPath(str, Enum):
    CMA = "cma"
    TCP = "tcp"
    NIXL = "nixl"


class Mode(str, Enum):
    REMOTE_ACCESSIBLE = "remote-accessible"
    TWO_SIDED = "two-sided"


Rounds: TypeAlias = Annotated[int, typer.Option(min=1, max=1000, help="How often to measure.")]
Threads: TypeAlias = Annotated[
    int, typer.Option(min=0, max=16, help="Threads of a transfer; 0: as many as cores, up to 4.")
]
JsonFile: TypeAlias = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", dir_okay=False, help="Write the figures here."),
]
PlotFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--plot", metavar="FILE", dir_okay=False, help="Draw a .png or .svg (needs matplotlib)."
    ),
]


def usual_threads() -> int:
    return min(4, len(os.sched_getaffinity(0)))


def check_files(json: Path | None, plot: Path | None) -> None:
    """Before anything is measured. Raises SetupError."""
    if plot is not None:
        from llm_datadist.cli.bench.plots import check_plot

        check_plot(plot)
    for file in (json, plot):
        if file is not None and not file.absolute().parent.is_dir():
            raise SetupError(f"{file}: there is no such folder")
