"""The outcome as a picture, through matplotlib (the extra `bench`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.cli.bench.failure import SetupError

if TYPE_CHECKING:
    from pathlib import Path

    from llm_datadist.cli.bench.report import Report


def check_plot(path: Path) -> None:
    """Before anything is measured. Raises SetupError."""
    if path.suffix not in (".png", ".svg"):
        raise SetupError(f"--plot {path}: name a .png or .svg file")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SetupError("--plot needs matplotlib: pip install 'llm-datadist[bench]'") from None


def draw(report: Report, path: Path) -> None:
    """Throughput by block size where there are several, else as bars."""
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
