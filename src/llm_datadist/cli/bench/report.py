"""The outcome of a contest: a table for people, JSON for programs, a picture."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table

from llm_datadist import __version__
from llm_datadist.cli.failure import SetupError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from llm_datadist.cli.bench.contest import Result


class Report:
    """Groups of results: those of one group were measured in alternation, ours first."""

    def __init__(self, groups: Sequence[Sequence[Result]]) -> None:
        self.groups = groups

    def to_table(self) -> Table:
        """One line a contestant; the last column compares the medians of the same rounds."""
        job = self.groups[0][0].job
        shape = job.workload
        mode = "remote-accessible" if job.is_accessible else "two-sided"
        title = (
            f"{job.operation}, {shape.name}: {shape.num_tensors} tensors, "
            f"{_nbytes(shape.moved_nbytes)}, {mode}, {job.threads} threads"
        )
        table = Table(title=title, title_justify="left", title_style="bold")
        for heading in ("block", "", "how"):
            table.add_column(heading, no_wrap=True)
        for heading in ("median", "GB/s", "best GB/s", "ours is"):
            table.add_column(heading, justify="right")
        for ours, *others in self.groups:
            table.add_section()
            for result in (ours, *others):
                table.add_row(*_cells(result, ours))
        return table

    def write_json(self, path: Path) -> None:
        """All figures, with what they were measured on."""
        figures = {**self._machine(), "groups": self._groups()}
        path.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")

    def _machine(self) -> dict[str, object]:
        return {
            "version": __version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
        }

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


def _cells(result: Result, ours: Result) -> tuple[str, ...]:
    workload = result.job.workload
    best = workload.moved_nbytes / result.best_s / 1e9
    ratio = "" if result is ours else f"{ours.times_as_fast_as(result):.2f} x"
    return (
        _nbytes(workload.block_nbytes),
        result.name,
        result.detail,
        _seconds(result.median_s),
        f"{result.gb_per_s:.2f}",
        f"{best:.2f}",
        ratio,
    )


def _nbytes(nbytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:.4g} {unit}"
    return f"{nbytes} B"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def check_plot(path: Path) -> None:
    """Before anything is measured. Raises SetupError."""
    if path.suffix not in (".png", ".svg"):
        raise SetupError(f"--plot {path}: name a .png or .svg file")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SetupError("--plot needs matplotlib: pip install matplotlib") from None


def draw(report: Report, path: Path) -> None:
    """As a picture: throughput by block size where there are several, else as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    first = report.groups[0]
    if len(report.groups) > 1:
        sizes = [group[0].job.workload.block_nbytes / 1024 for group in report.groups]
        for index, result in enumerate(first):
            speeds = [group[index].gb_per_s for group in report.groups]
            axes.plot(sizes, speeds, marker="o", label=result.name)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("block, KiB")
        axes.set_ylabel("GB/s")
        axes.set_ylim(bottom=0)
        axes.legend()
    else:
        names = [result.name for result in first]
        bars = axes.barh(names, [result.gb_per_s for result in first])
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.invert_yaxis()
        axes.set_xlabel("GB/s")
    axes.set_title(f"{first[0].job.operation}, {first[0].job.workload.name}")
    figure.savefig(path)
