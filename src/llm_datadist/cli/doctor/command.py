"""The verb `doctor`: its options, and its exit codes.

0: nothing has to be mended. 1: something will not work, or be slow or unsafe, until it is mended.
2: the doctor was asked in a way that it does not understand.
"""

# No `from __future__ import annotations`: typer reads the types when it runs.

from typing import Annotated

import typer

from llm_datadist.endpoint import Endpoint
from llm_datadist.errors import LLMException


def _endpoint(text: str | None) -> Endpoint | None:
    if text is None:
        return None
    try:
        return Endpoint.parse(text)
    except (LLMException, ValueError) as error:
        raise typer.BadParameter(str(error)) from None


def _listen(text: str | None) -> Endpoint | None:
    endpoint = _endpoint(text)
    if endpoint is not None and not endpoint.is_literal:
        raise typer.BadParameter(f"a cluster listens on an IP address, got {endpoint.host!r}")
    return endpoint


def doctor(
    listen: Annotated[
        str | None,
        typer.Option(metavar="IP:PORT", help="Try the address that a cluster is to listen on."),
    ] = None,
    peer: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Link to this running cluster, and say how it is."),
    ] = None,
    measure: Annotated[
        bool | None,
        typer.Option(
            help="Measure the paths on this host: 1 to 2 s at full speed, 300 MiB of memory. "
            "By default unless there is a --peer, which may be at work here."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: state, and findings with their data.")
    ] = False,
) -> None:
    """Say whether links will be fast and safe here, and what to do where they will not.

    Exit code 0: nothing has to be mended; 1: something has; 2: wrong usage.
    """
    listen_at, peer_at = _listen(listen), _endpoint(peer)
    # not needed by `--help`
    from rich.console import Console

    from llm_datadist.cli.doctor.examination import examine
    from llm_datadist.cli.doctor.finding import Case
    from llm_datadist.cli.doctor.report import Report

    console = Console(highlight=False)
    measures = peer_at is None if measure is None else measure
    with Console(stderr=True).status("") as status:
        sections = examine(Case(listen_at, peer_at), measures=measures, show=status.update)
    report = Report(sections)
    if as_json:
        typer.echo(report.to_json())
    else:
        console.print(report.to_screen())
    raise typer.Exit(1 if report.has_problems else 0)
