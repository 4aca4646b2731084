"""The verb `bench`: its options, and its exit codes.

0: measured, every byte verified. 1: a contestant failed. 2: something is to be set up.
"""

# No `from __future__ import annotations`: typer reads the types when it runs.

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_datadist.cli.bench.workload import SHAPES, Workload
from llm_datadist.cli.failure import SetupError, explained

if TYPE_CHECKING:
    from llm_datadist.cli.bench.report import Report
    from llm_datadist.cli.bench.scenarios import Figure


app = typer.Typer(invoke_without_command=True)


class Operation(str, Enum):
    PULL_BLOCKS = "pull_blocks"
    PUSH_BLOCKS = "push_blocks"
    PULL_CACHE = "pull_cache"
    TRANSFER_CACHE_ASYNC = "transfer_cache_async"


class LinkPath(str, Enum):
    CMA = "cma"
    TCP = "tcp"
    NIXL = "nixl"


class Mode(str, Enum):
    REMOTE_ACCESSIBLE = "remote-accessible"
    TWO_SIDED = "two-sided"


@app.callback()
def move(
    context: typer.Context,
    shape: Annotated[str, typer.Option(help=f"The cache: {', '.join(SHAPES)}.")] = "llama3-8b",
    operation: Annotated[
        Operation, typer.Option(help="What of CacheManager to measure.")
    ] = Operation.PULL_BLOCKS,
    path: Annotated[LinkPath, typer.Option(help="How the bytes travel.")] = LinkPath.CMA,
    mode: Annotated[
        Mode, typer.Option(help="Whether peers may read on their own.")
    ] = Mode.REMOTE_ACCESSIBLE,
    vs: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Measured in alternation, comma-separated: memcpy, readv, socket, two-sided, "
            "verified, nixl, mooncake, or none. By default the path's ceiling: memcpy or socket.",
        ),
    ] = "",
    tensors: Annotated[int, typer.Option(min=0, help="Instead of the shape's.")] = 0,
    blocks: Annotated[int, typer.Option(min=0, help="Blocks of a cache.")] = 0,
    moved: Annotated[int, typer.Option(min=0, help="Blocks that are moved.")] = 0,
    block_bytes: Annotated[
        str,
        typer.Option(
            metavar="SIZES",
            help="Instead of the shape's: a size, several with commas, or a sweep such as 4k..2m.",
        ),
    ] = "",
    contiguous: Annotated[
        bool, typer.Option("--contiguous", help="Move one run of blocks instead of scattered ones.")
    ] = False,
    threads: Annotated[
        int, typer.Option(min=0, max=16, help="Threads, or streams; 0: as many as cores, up to 4.")
    ] = 0,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of the alternation.")] = 7,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Write the figures here.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="Draw a .png or .svg (extra `bench`)."),
    ] = None,
) -> None:
    """Measure how fast caches move between two processes, beside what else this machine can do.

    Every contestant runs in processes of its own, proves on poisoned memory that it moves the right
    bytes and touches no others, and is then measured in alternation with the rest. Machines are
    noisy: trust the ratios, which compare the same rounds.

    Exit code 0: measured, every byte verified; 1: a contestant failed; 2: wrong usage, or something
    is to be set up.
    """
    if context.invoked_subcommand is not None:
        return
    with explained("bench"):
        workloads = _workloads(shape, tensors, blocks, moved, block_bytes)
        if contiguous or operation is Operation.PULL_CACHE:
            workloads = [replace(workload, is_contiguous=True) for workload in workloads]
        if operation in (Operation.PUSH_BLOCKS, Operation.TRANSFER_CACHE_ASYNC):
            _require_accessible(mode)
        if plot is not None:
            from llm_datadist.cli.bench.report import check_plot

            check_plot(plot)
        for file in (json, plot):
            if file is not None and not file.absolute().parent.is_dir():
                raise SetupError(f"{file}: there is no such folder")
        rivals = _rivals(vs, path)
        threads = threads or usual_threads()
        report = _run(workloads, operation, path, mode, rivals, threads, rounds)
        if json is not None:
            report.write_json(json)
        if plot is not None:
            from llm_datadist.cli.bench.report import draw

            draw(report, plot)


Rounds = Annotated[int, typer.Option(min=1, max=1000, help="How often to measure.")]
Threads = Annotated[
    int, typer.Option(min=0, max=16, help="Threads of a transfer; 0: as many as cores, up to 4.")
]


@app.command()
def plan(rounds: Rounds = 9) -> None:
    """How long it takes to turn block lists into the vectors of a system call."""
    _show_figures("plan", rounds)


@app.command()
def startup(rounds: Rounds = 9) -> None:
    """How long `import llm_datadist` takes in a fresh interpreter."""
    _show_figures("startup", rounds)


@app.command()
def link(rounds: Rounds = 9) -> None:
    """How long link_clusters takes on one host, for one cluster and for 64 in one call."""
    _show_figures("link", rounds)


@app.command()
def fan_out(rounds: Rounds = 5, threads: Threads = 0) -> None:
    """Eight decode processes that pull from one prefill at once (needs 12 GiB of memory)."""
    _show_figures("fan_out", rounds, threads or usual_threads())


@app.command()
def layers(rounds: Rounds = 5, threads: Threads = 0) -> None:
    """What is left to wait for when layers are pushed while the caller computes the next ones."""
    _show_figures("layers", rounds, threads or usual_threads())


@app.command()
def many_links(
    count: Annotated[int, typer.Option(min=2, max=4096, help="How many clusters.")] = 512,
    path: Annotated[LinkPath, typer.Option(help="The path of the links.")] = LinkPath.CMA,
) -> None:
    """What many links cost one process: time, memory, threads, and each pull among them."""
    from llm_datadist.cli.bench import many

    _show("many_links", lambda: many.many_links(count, path.value))


def _show_figures(scenario: str, *arguments: int) -> None:
    from llm_datadist.cli.bench import scenarios

    _show(scenario, lambda: getattr(scenarios, scenario)(*arguments))


def _show(scenario: str, figures: Callable[[], "Iterator[Figure]"]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    console = Console()
    with explained("bench"), console.status(scenario, spinner="line"):
        for figure in figures():
            table.add_row(figure.name, f"{figure.value:.3f}", figure.unit)
    console.print(table)


def usual_threads() -> int:
    return min(4, len(os.sched_getaffinity(0)))


def _run(
    workloads: list[Workload],
    operation: Operation,
    path: LinkPath,
    mode: Mode,
    rivals: list[str],
    threads: int,
    rounds: int,
) -> "Report":
    # not needed by `--help`
    from rich.console import Console

    from llm_datadist.cli.bench.contest import compete, line_up
    from llm_datadist.cli.bench.contestant import Job
    from llm_datadist.cli.bench.report import Report

    console = Console()
    groups = []
    with console.status("", spinner="line") as status:
        for workload in workloads:
            is_accessible = mode is Mode.REMOTE_ACCESSIBLE
            job = Job(workload, operation.value, path.value, is_accessible, threads)
            groups.append(compete(line_up(job, rivals), rounds, status.update))
    report = Report(groups)
    console.print(report.to_table())
    return report


def _require_accessible(mode: Mode) -> None:
    if mode is Mode.TWO_SIDED:
        raise SetupError("pushes by key need --mode remote-accessible")


def _rivals(vs: str, path: LinkPath) -> list[str]:
    if vs == "none":
        return []
    return vs.split(",") if vs else ["socket" if path is LinkPath.TCP else "memcpy"]


def _workloads(
    shape: str, tensors: int, blocks: int, moved: int, block_bytes: str
) -> list[Workload]:
    if shape not in SHAPES:
        raise SetupError(f"--shape {shape}: choose from {', '.join(SHAPES)}")
    base = SHAPES[shape]
    own = replace(
        base,
        num_tensors=tensors or base.num_tensors,
        num_blocks=blocks or base.num_blocks,
        num_moved=moved or base.num_moved,
    )
    if own.num_moved > own.num_blocks:
        raise SetupError(f"--moved {own.num_moved}: the cache has {own.num_blocks} blocks")
    return [own.with_blocks_of(nbytes) for nbytes in _sizes(block_bytes)] or [own]


def _sizes(text: str) -> list[int]:
    first, dots, last = text.partition("..")
    if not dots:
        return [_size(part) for part in text.split(",")] if text else []
    sizes = [_size(first)]
    while sizes[-1] * 2 <= _size(last):
        sizes.append(sizes[-1] * 2)
    return sizes


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d{1,12})(k|m|)", text.strip().lower())
    if match is None or int(match[1]) == 0:
        raise SetupError(f"--block-bytes {text}: write 4096, 4k or 2m, or a sweep such as 4k..2m")
    nbytes = int(match[1]) * {"": 1, "k": 1024, "m": 1024 * 1024}[match[2]]
    if nbytes % 8:
        raise SetupError(f"--block-bytes {text}: a block is made of words of 8 bytes")
    return nbytes
