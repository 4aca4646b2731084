"""The sub-verbs of `bench`: what else has a price."""

# No `from __future__ import annotations`: typer reads the types when it runs.

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_datadist.cli.bench.options import (
    JsonFile,
    LinkPath,
    Mode,
    PlotFile,
    Rounds,
    Threads,
    check_files,
    usual_threads,
)
from llm_datadist.cli.failure import explained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llm_datadist.cli.bench.scenarios import Figure


def plan(rounds: Rounds = 9, json: JsonFile = None, plot: PlotFile = None) -> None:
    """How long it takes to turn block lists into the vectors of a system call."""
    _run("plan", {"rounds": rounds}, json, plot)


def startup(rounds: Rounds = 9, json: JsonFile = None, plot: PlotFile = None) -> None:
    """How long a fresh interpreter takes to import llm_datadist, and to have a peer's block."""
    _run("startup", {"rounds": rounds}, json, plot)


def link(rounds: Rounds = 9, json: JsonFile = None, plot: PlotFile = None) -> None:
    """How long link_clusters takes on one host, for one cluster and for 64 in one call."""
    _run("link", {"rounds": rounds}, json, plot)


def fan_out(
    rounds: Rounds = 5, threads: Threads = 0, json: JsonFile = None, plot: PlotFile = None
) -> None:
    """Eight decode processes that pull from one prefill at once (needs 12 GiB of memory)."""
    _run("fan_out", {"rounds": rounds, "threads": threads or usual_threads()}, json, plot)


def layers(
    rounds: Rounds = 5, threads: Threads = 0, json: JsonFile = None, plot: PlotFile = None
) -> None:
    """What is left to wait for when layers are pushed while the caller computes the next ones."""
    _run("layers", {"rounds": rounds, "threads": threads or usual_threads()}, json, plot)


def many_links(
    count: Annotated[int, typer.Option(min=2, max=4096, help="How many clusters.")] = 512,
    path: Annotated[LinkPath, typer.Option(help="The path of the links.")] = LinkPath.CMA,
    json: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """What many links cost one process: time, memory, threads, and each pull among them."""
    _run("many_links", {"count": count, "path": path.value}, json, plot)


def calls(
    rounds: Rounds = 5,
    path: Annotated[LinkPath, typer.Option(help="How the bytes travel.")] = LinkPath.CMA,
    mode: Annotated[Mode, typer.Option(help="Who finds the bytes.")] = Mode.REMOTE_ACCESSIBLE,
    json: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """What single blocks cost: the first pull behind a link, and 32 threads beside one."""
    settings: dict[str, int | str] = {"rounds": rounds, "path": path.value, "mode": mode.value}
    _run("calls", settings, json, plot)


VERBS = (plan, startup, link, fan_out, layers, many_links, calls)
#: of those that are not in `scenarios`
_MODULES = {"startup": "starting", "many_links": "many", "calls": "calls"}


def _run(
    scenario: str, settings: dict[str, int | str], json: Path | None, plot: Path | None
) -> None:
    from rich.console import Console

    with explained("bench"):
        check_files(json, plot)

        from llm_datadist.cli.bench.report import Findings

        console = Console()
        with console.status(scenario, spinner="line"):
            findings = Findings(scenario, settings, list(_figures(scenario)(**settings)))
        console.print(findings.to_screen())
        if json is not None:
            findings.write_json(json)
        if plot is not None:
            from llm_datadist.cli.bench.plots import draw_findings

            draw_findings(findings, plot)


def _figures(scenario: str) -> "Callable[..., Iterator[Figure]]":
    module = import_module(f"llm_datadist.cli.bench.{_MODULES.get(scenario, 'scenarios')}")
    found: Callable[..., Iterator[Figure]] = getattr(module, scenario)
    return found
