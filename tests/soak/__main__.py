"""The long run: `python -m soak` in tests/, or `make soak`."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from soak.cases import CASES, Case
from soak.tally import Tally


@dataclass
class Outcome:
    """A case that was run."""

    case: Case
    tally: Tally
    took_s: float
    #: what ended it before its time
    error: str = ""

    @property
    def num_failures(self) -> int:
        return len(self.tally.failures) + bool(self.error)

    @property
    def is_clean(self) -> bool:
        return self.tally.is_clean and not self.error


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="This case alone; may be repeated.")
    ] = None,
    scale: Annotated[float, typer.Option(min=0.0, help="So many times the rounds.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 1,
) -> None:
    """Runs the cases for long; exits with 1 if anything failed or leaked."""
    names = [case.name for case in CASES]
    unknown = set(only or ()) - set(names)
    if unknown:
        raise typer.BadParameter(f"no case {', '.join(unknown)}; there are {', '.join(names)}")
    chosen = [case for case in CASES if not only or case.name in only]
    console, log_path = set_log_apart()
    with Progress(
        TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), console=console, redirect_stdout=False,
    ) as progress:  # fmt: skip
        outcomes = [run(case, scale, seed, progress) for case in chosen]
    report(outcomes, console)
    console.print(f"What the library logged: {log_path}")
    raise typer.Exit(not all(outcome.is_clean for outcome in outcomes))


def set_log_apart() -> tuple[Console, str]:
    """The terminal for us; what this process and its children log to stdout goes to a file."""
    console = Console(file=os.fdopen(os.dup(sys.stdout.fileno()), "w"))
    log_fd, log_path = tempfile.mkstemp(".log", "soak-")
    os.dup2(log_fd, sys.stdout.fileno())
    return console, log_path


def run(case: Case, scale: float, seed: int, progress: Progress) -> Outcome:
    rounds = max(1, round(case.long * scale))
    bar = progress.add_task(case.name, total=rounds)
    begun = time.monotonic()

    def advance() -> None:
        is_timed = case.unit == "seconds"
        done = int(time.monotonic() - begun) if is_timed else tally.rounds
        progress.update(bar, completed=min(done, rounds))

    tally = Tally(seed, is_long=True, on_round=advance)
    error = ""
    try:
        case.function(rounds, tally)
    except Exception:
        error = traceback.format_exc()
    progress.stop_task(bar)
    return Outcome(case, tally, time.monotonic() - begun, error)


def report(outcomes: list[Outcome], console: Console) -> None:
    table = Table("case")
    for heading in ("rounds", "failures", "worst s over deadline", "leaks", "took s"):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        tally = outcome.tally
        worst = f"{tally.worst_over_s:.3f}" if tally.rounds else "-"
        table.add_row(
            outcome.case.name, f"{tally.rounds:,}", str(outcome.num_failures), worst,
            str(len(tally.leaks)), f"{outcome.took_s:.0f}",
            style=None if outcome.is_clean else "red",
        )  # fmt: skip
    console.print(table)
    for outcome in outcomes:
        for note in (*outcome.tally.failures, *outcome.tally.leaks, outcome.error):
            if note:
                console.print(f"{outcome.case.name}: {note}", style="red", markup=False)


if __name__ == "__main__":
    typer.run(main)
