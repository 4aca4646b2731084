"""A fleet under load for ten minutes: `make fleet`, or `python -m fleet` in tests/."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from directory.etcd_server import EtcdServer, etcd_program
from fleet.findings import Findings, find, rows
from fleet.run import play
from fleet.stage import OURS, Fleet
from fleet.worker import pulls_in


def main(
    directory: Annotated[str, typer.Option(help="etcd or folder.")] = "etcd",
    seconds: Annotated[float, typer.Option(min=1.0)] = 600.0,
    events: Annotated[int, typer.Option(min=1)] = 500,
    library: Annotated[str, typer.Option(help=f"{OURS}, nixl or mooncake.")] = OURS,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 1,
) -> None:
    """4 prefills, 4 decodes, verified pulls, 500 events; exits with 1 if a bystander noticed."""
    console = Console(file=os.fdopen(os.dup(sys.stdout.fileno()), "w"))
    folder = Path(tempfile.mkdtemp(prefix="fleet-"))
    log_fd = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log_fd, sys.stdout.fileno())
    server = EtcdServer(folder, etcd_program()) if directory == "etcd" else None
    with server or nullcontext(), Progress(console=console, redirect_stdout=False) as progress:
        bar = progress.add_task("events", total=events)
        with Fleet(folder, server, library) as fleet:
            done = play(fleet, seconds, events, seed, lambda n: progress.update(bar, completed=n))
        (folder / "events").write_text("".join(f"{event}\n" for event in done.events))
        findings = find(done, pulls_in(fleet.notes))
        findings.crashes = fleet.crashes
    report(findings, console)
    if findings.is_clean:
        shutil.rmtree(folder)
    else:
        console.print(f"What was noted and logged: {folder}")
    raise typer.Exit(not findings.is_clean)


def report(findings: Findings, console: Console) -> None:
    table = Table("event")
    for heading in ("events", "failed pulls", "good again: median s", "worst s", "never"):
        table.add_column(heading, justify="right")
    for row in rows(findings):
        table.add_row(*row)
    console.print(table)
    console.print(
        f"{findings.pulls:,} pulls, {findings.good:,} good; of who was not concerned "
        f"{len(findings.unconcerned)} failed; {len(findings.wrong)} with wrong bytes; "
        f"{findings.late} too late; {findings.crashes} processes ended by themselves"
    )
    for pull in (*findings.wrong, *findings.unconcerned)[:20]:
        console.print(str(pull), style="red", markup=False)


if __name__ == "__main__":
    typer.run(main)
