"""Outcomes as pictures. Needs matplotlib."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from llm_datadist.cli.bench.report import count_nbytes
from llm_datadist.cli.failure import SetupError

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llm_datadist.cli.bench.report import Findings, Report

_WIDTH = 8.0
_BAR_HEIGHT = 0.42
_KIB = 1024


def check_plot(path: Path) -> None:
    """Before anything is measured. Raises SetupError."""
    if path.suffix not in (".png", ".svg"):
        raise SetupError(f"--plot {path}: name a .png or .svg file")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SetupError("--plot needs matplotlib: pip install matplotlib") from None


def draw(report: Report, path: Path) -> None:
    """Throughput by block size where there are several, else as bars."""
    figure = _new_figure(4.5)
    axes = figure.add_subplot()
    first, *more = report.groups
    if more:
        _draw_sweep(report, axes)
        figure.suptitle(report.title, fontsize="medium", wrap=True)
    else:
        bars = axes.barh([result.name for result in first], [each.gb_per_s for each in first])
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.margins(x=0.1)
        axes.invert_yaxis()
        axes.set_xlabel("GB/s")
        block = count_nbytes(first[0].job.workload.block_nbytes)
        figure.suptitle(f"{report.title}, blocks of {block}", fontsize="medium", wrap=True)
    _save(figure, path)


def _draw_sweep(report: Report, axes: Axes) -> None:
    sizes = [group[0].job.workload.block_nbytes / _KIB for group in report.groups]
    for index, result in enumerate(report.groups[0]):
        speeds = [group[index].gb_per_s for group in report.groups]
        axes.plot(sizes, speeds, marker="o", label=result.name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("block size, KiB")
    axes.set_ylabel("GB/s")
    axes.set_ylim(bottom=0)
    axes.legend()


def draw_findings(findings: Findings, path: Path) -> None:
    """Bars, each unit on an axis of its own."""
    by_unit = sorted(findings.figures, key=lambda each: each.unit)
    groups = [list(group) for _, group in groupby(by_unit, key=lambda each: each.unit)]
    lines = len(by_unit) + 2.5 * len(groups)
    figure = _new_figure(_BAR_HEIGHT * lines)
    heights = [len(group) + 0.5 for group in groups]
    columns = figure.subplots(len(groups), squeeze=False, height_ratios=heights)
    for (axes,), group in zip(columns, groups, strict=True):
        bars = axes.barh([each.name for each in group], [each.value for each in group])
        axes.bar_label(bars, fmt="%.3g", padding=3)
        axes.margins(x=0.18)
        axes.invert_yaxis()
        axes.set_xlabel(group[0].unit or "count")
    figure.suptitle(findings.title, fontsize="medium", wrap=True)
    _save(figure, path)


def _new_figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path)
    except OSError as error:
        raise SetupError(f"{path}: {error.strerror}") from None
