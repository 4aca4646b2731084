"""Runs vLLM with a KV connector between prefill and decode, and proves what it changes: the time.

Exit code 0: all is as it should be. 1: something is not. 2: something is to be set up.
"""

# No `from __future__ import annotations`: typer reads the types when it runs.

import json as json_format
import signal
import sys
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import httpx
import typer
from connector import Connector
from rich.console import Console
from rich.table import Table
from rich.text import Text
from session import Session

from llm_datadist.cli.failure import CommandError, SetupError

if TYPE_CHECKING:
    from collections.abc import Callable

_BUILD = Path(__file__).resolve().parent.parent.parent / "build" / "vllm"


class Part(str, Enum):
    """What can be run alone."""

    PARITY = "parity"
    FAILURES = "failures"
    HYBRID = "hybrid"
    SHAPES = "shapes"
    OVERLAP = "overlap"
    CHAT = "chat"
    ROUTERS = "routers"
    FLEET = "fleet"
    UPSTREAM = "upstream"
    STALE = "stale"
    TTFT = "ttft"


class Result(Protocol):
    """What a part found."""

    @property
    def verdict(self) -> str:
        """A few words for the closing line."""
        ...

    def table(self) -> Table:
        """All of it, for the eye."""
        ...

    def figures(self) -> dict[str, object]:
        """All of it, for JSON."""
        ...


def main(
    parts: Annotated[
        list[Part] | None, typer.Argument(help="What to run; everything without.")
    ] = None,
    connector: Annotated[
        Connector, typer.Option(help="Who moves the KV cache. ttft compares it with nixl.")
    ] = Connector.LLM_DATADIST,
    rounds: Annotated[
        int, typer.Option(min=1, help="ttft: how often each connector has its turn.")
    ] = 2,
    samples: Annotated[
        int, typer.Option(min=1, help="ttft: prompts of each length in a round.")
    ] = 4,
    vllm_source: Annotated[
        Path | None, typer.Option(metavar="DIR", help="upstream: vLLM's unpacked sources.")
    ] = None,
    build: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the model and the logs go.")
    ] = _BUILD,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Write the figures here.")
    ] = None,
) -> None:
    """Run vLLM servers on this machine's CPU and look at their answers.

    parity: the tokens are those of one server. failures: prefill is killed, and no answer is ever
    wrong. hybrid: models of every kind of KV cache answer as they do alone. shapes: so does one by
    prefill and decode of other sizes. overlap: and one whose decode reads while prefill computes.
    chat: prefill reads what decode has answered, and computes what is new. routers: vllm-router in
    front of several of each, one of which is killed. fleet: the same with engines that announce
    themselves, and all is answered. stale: blocks that hold something else by then are never taken
    for the right ones. ttft: the time to the first token, beside NixlConnector. Only when it is
    named: upstream, vLLM's own checks and proxy, which are in its source distribution.
    """
    # A SIGTERM ends the servers as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    console = Console(highlight=False)
    try:
        if json is not None and not json.absolute().parent.is_dir():
            raise SetupError(f"--json {json}: there is no such folder.")
        results = _run(
            console, parts or _all_of(connector), connector, rounds, samples, vllm_source, build
        )
        if json is not None:
            _write(json, connector, results)
    except CommandError as error:
        typer.secho(f"vllm-demo: {error}", fg="red", err=True)
        raise typer.Exit(error.exit_code) from None
    except httpx.HTTPError as error:
        typer.secho(
            f"vllm-demo: a server does not answer as it should: {error!r}. "
            f"The logs are under {build / 'logs'}.",
            fg="red",
            err=True,
        )
        raise typer.Exit(1) from None
    is_good = all(getattr(result, "is_good", True) for result in results.values())
    verdicts = ", ".join(result.verdict for result in results.values())
    console.print(Text(f"vllm-demo: {verdicts}", "bold"), soft_wrap=True)
    raise typer.Exit(0 if is_good else 1)


def _run(
    console: Console,
    parts: list[Part],
    connector: Connector,
    rounds: int,
    samples: int,
    vllm_source: Path | None,
    build: Path,
) -> dict[str, Result]:
    start_s = time.monotonic()

    def report(doing: str) -> None:
        elapsed = f"{time.monotonic() - start_s:6.0f} s  {doing}"
        console.print(Text(elapsed, "dim"), soft_wrap=True)

    logs = build / "logs" / time.strftime("%Y%m%d-%H%M%S")
    logs.mkdir(parents=True)
    report(f"logs of all servers: {logs}")
    session = Session(build, logs, connector, report)
    run: dict[Part, Callable[[], Result]] = {
        Part.PARITY: session.parity,
        Part.FAILURES: session.failures,
        Part.HYBRID: session.hybrid,
        Part.SHAPES: session.shapes,
        Part.OVERLAP: session.overlap,
        Part.CHAT: session.chat,
        Part.ROUTERS: session.routers,
        Part.FLEET: session.fleet,
        Part.UPSTREAM: lambda: session.upstream(vllm_source),
        Part.STALE: session.stale,
        Part.TTFT: lambda: session.ttft(rounds, samples),
    }
    results: dict[str, Result] = {}
    for part in dict.fromkeys(parts):
        results[part.value] = result = run[part]()
        console.print(result.table())
    return results


def _all_of(connector: Connector) -> list[Part]:
    ours = (Part.OVERLAP, Part.CHAT, Part.FLEET) if connector is Connector.NIXL else ()
    return [part for part in Part if part not in (*ours, Part.UPSTREAM)]


def _write(file: Path, connector: Connector, results: dict[str, Result]) -> None:
    figures: dict[str, object] = {"connector": connector.vllm_name}
    figures |= {part: result.figures() for part, result in results.items()}
    file.write_text(json_format.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
