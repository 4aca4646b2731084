"""The verb `bench`: its options, and its exit codes.

0: measured, every byte verified. 1: a contestant failed. 2: something is to be set up.
"""

# No `from __future__ import annotations`: typer reads the types when it runs.

import re
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from llm_datadist.cli.bench.options import (
    JsonFile,
    LinkPath,
    Mode,
    PlotFile,
    check_files,
    usual_threads,
)
from llm_datadist.cli.bench.verbs import VERBS
from llm_datadist.cli.bench.workload import SHAPES, Workload
from llm_datadist.cli.failure import SetupError, explained

if TYPE_CHECKING:
    from llm_datadist.cli.bench.report import Report

#: what 0 stands for
_SHAPES = "as the shape has"

app = typer.Typer(invoke_without_command=True)


class Operation(str, Enum):
    PULL_BLOCKS = "pull_blocks"
    PUSH_BLOCKS = "push_blocks"
    PULL_CACHE = "pull_cache"
    TRANSFER_CACHE_ASYNC = "transfer_cache_async"


@app.callback()
def move(
    context: typer.Context,
    shape: Annotated[str, typer.Option(help=f"The cache: {', '.join(SHAPES)}.")] = "llama3-8b",
    operation: Annotated[
        Operation,
        typer.Option(
            metavar="NAME", help=f"What of CacheManager to measure: {', '.join(Operation)}."
        ),
    ] = Operation.PULL_BLOCKS,
    path: Annotated[LinkPath, typer.Option(help="How the bytes travel.")] = LinkPath.CMA,
    mode: Annotated[
        Mode,
        typer.Option(metavar="MODE", help=f"Who finds the bytes: {' or '.join(Mode)}."),
    ] = Mode.REMOTE_ACCESSIBLE,
    vs: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Measured in alternation, comma-separated: memcpy, readv, socket, two-sided, "
            "verified, nixl, mooncake, or none. By default the path's ceiling: memcpy or socket.",
        ),
    ] = "",
    tensors: Annotated[int, typer.Option(min=0, help="Of a cache.", show_default=_SHAPES)] = 0,
    blocks: Annotated[int, typer.Option(min=0, help="Of a cache.", show_default=_SHAPES)] = 0,
    moved: Annotated[
        int, typer.Option(min=0, help="Blocks that are moved.", show_default=_SHAPES)
    ] = 0,
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
    json: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Measure how fast caches move between two processes, beside what else this machine can do.

    Every contestant runs in processes of its own, proves on poisoned memory that it moves the right
    bytes and touches no others, and is then measured in alternation with the rest. Machines are
    noisy: trust the ratios, which compare the same rounds.

    More: `llm-datadist docs performance`.

    Exit code 0: measured, every byte verified; 1: a contestant failed; 2: wrong usage, or something
    is to be set up.
    """
    with explained("bench"):
        if context.invoked_subcommand is not None:
            _refuse_options(context)
            return
        workloads = _workloads(shape, tensors, blocks, moved, block_bytes)
        if contiguous or operation is Operation.PULL_CACHE:
            workloads = [replace(workload, is_contiguous=True) for workload in workloads]
        if operation in (Operation.PUSH_BLOCKS, Operation.TRANSFER_CACHE_ASYNC):
            _require_accessible(mode)
        check_files(json, plot)
        rivals = _rivals(vs, path)
        threads = threads or usual_threads()
        report = _run(workloads, operation, path, mode, rivals, threads, rounds)
        if json is not None:
            report.write_json(json)
        if plot is not None:
            from llm_datadist.cli.bench.plots import draw

            draw(report, plot)


for verb in VERBS:
    app.command()(verb)


def _refuse_options(context: typer.Context) -> None:
    """What stands before a sub-verb would be without effect."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option, verb = name.replace("_", "-"), context.invoked_subcommand
            raise SetupError(f"--{option} before {verb} says nothing to it: write it behind {verb}")


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
    console.print(report.to_screen())
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
