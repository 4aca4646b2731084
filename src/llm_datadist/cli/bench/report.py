"""The outcome of a contest: a table for people, JSON for programs, a picture."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from llm_datadist import __version__
from llm_datadist.cli.failure import SetupError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from llm_datadist.cli.bench.contest import Result
    from llm_datadist.cli.bench.scenarios import Figure


class Report:
    """Groups of results: those of one group were measured in alternation, ours first."""

    def __init__(self, groups: Sequence[Sequence[Result]]) -> None:
        self.groups = groups

    @property
    def title(self) -> str:
        """What was moved, and how."""
        job = self.groups[0][0].job
        shape = job.workload
        mode = "remote-accessible" if job.is_accessible else "two-sided"
        return (
            f"{job.operation} over {job.path}, {mode}, {shape.name}: {shape.num_tensors} tensors, "
            f"{count_nbytes(shape.moved_nbytes)}, {job.threads} threads"
        )

    def to_screen(self) -> Group:
        """One line a contestant; the last column compares the medians of the same rounds."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="underline")
        for heading in ("block", "", "how"):
            table.add_column(heading, no_wrap=True)
        for heading in ("median", "GB/s", "best GB/s", "ours is"):
            table.add_column(heading, justify="right", no_wrap=True)
        for ours, *others in self.groups:
            for result in (ours, *others):
                table.add_row(*_cells(result, ours))
        return _titled(self.title, table)

    def write_json(self, path: Path) -> None:
        """All figures, with what they were measured on."""
        _write({"groups": self._groups()}, path)

    def _groups(self) -> list[list[dict[str, object]]]:
        return [
            [
                {
                    "name": result.name,
                    "detail": result.detail,
                    **asdict(result.job),
                    "moved_nbytes": result.job.workload.moved_nbytes,
                    "verified": True,  # whoever fails that is not in a report
                    "median_s": result.median_s,
                    "gb_per_s": result.gb_per_s,
                    "rounds_s": result.rounds_s,
                    "ours_times_as_fast": group[0].times_as_fast_as(result),
                }
                for result in group
            ]
            for group in self.groups
        ]


@dataclass(frozen=True)
class Findings:
    """What a sub-verb measured."""

    scenario: str
    settings: Mapping[str, int | str]
    figures: Sequence[Figure]

    @property
    def title(self) -> str:
        """What was measured, and how."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return f"{self.scenario.replace('_', '-')}: {settings}"

    def to_screen(self) -> Group:
        """One line a figure."""
        table = Table(show_header=False)
        table.add_column()
        table.add_column(justify="right")
        table.add_column()
        for figure in self.figures:
            table.add_row(figure.name, f"{figure.value:.3f}", figure.unit)
        return _titled(self.title, table)

    def write_json(self, path: Path) -> None:
        """All figures, with what they were measured on."""
        figures = [figure._asdict() for figure in self.figures]
        _write(
            {"scenario": self.scenario, "settings": dict(self.settings), "figures": figures}, path
        )


def _titled(title: str, table: Table) -> Group:
    """A table's own title would be broken where the table ends, and not the terminal."""
    return Group(Text(title, "bold"), table)


def _write(figures: dict[str, object], path: Path) -> None:
    machine = {
        "version": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
    }
    try:
        path.write_text(json.dumps(machine | figures, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise SetupError(f"{path}: {error.strerror}") from None


def _cells(result: Result, ours: Result) -> tuple[str, ...]:
    workload = result.job.workload
    best = workload.moved_nbytes / result.best_s / 1e9
    ratio = "" if result is ours else f"{ours.times_as_fast_as(result):.2f} x"
    return (
        count_nbytes(workload.block_nbytes),
        result.name,
        result.detail,
        _seconds(result.median_s),
        f"{result.gb_per_s:.2f}",
        f"{best:.2f}",
        ratio,
    )


def count_nbytes(nbytes: int) -> str:
    """In the largest unit that it has one of."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:.4g} {unit}"
    return f"{nbytes} B"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
