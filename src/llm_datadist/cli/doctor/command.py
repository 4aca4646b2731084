"""The verb `doctor`: its options, its checks, and its exit codes.

0: nothing has to be mended. 1: something will not work, or be slow or unsafe, until it is mended.
2: the doctor was asked in a way that it does not understand.
"""

# No `from __future__ import annotations`: typer reads the types when it runs.

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from llm_datadist.endpoint import Endpoint
from llm_datadist.errors import LLMException

if TYPE_CHECKING:
    from llm_datadist.cli.doctor.findings import Case, Check, Finding, Section


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
    shows_all: Annotated[
        bool, typer.Option("--all", help="Every finding, also where the terminal is too small.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: state, and findings with their data.")
    ] = False,
) -> None:
    """Say whether links will be fast and safe here, and what to do where they will not.

    Where that takes more lines than the terminal has, what is as it should be is named, no more;
    `--all` and pipes get every finding.

    More: `llm-datadist docs doctor`.

    Exit code 0: nothing has to be mended; 1: something has; 2: wrong usage.
    """
    listen_at, peer_at = _listen(listen), _endpoint(peer, "--peer", "host:port")
    # not needed by `--help`
    from rich.console import Console

    from llm_datadist.cli.doctor.findings import Case, Report

    console = Console(highlight=False)
    measures = peer_at is None if measure is None else measure
    with Console(stderr=True).status("", spinner="line") as status:
        case = Case(listen_at, peer_at)
        sections = _examine(case, _checks(case, measures=measures), status.update)
    report = Report(sections)
    if as_json:
        typer.echo(report.to_json())
    else:
        screen = report.to_screen()
        fits = len(console.render_lines(screen)) < console.height
        shown = screen if shows_all or fits or not console.is_terminal else report.to_brief_screen()
        console.print(shown)
    raise typer.Exit(1 if report.has_problems else 0)


def _endpoint(text: str | None, option: str, form: str) -> Endpoint | None:
    if text is None:
        return None
    try:
        return Endpoint.parse(text, form=form)
    except (LLMException, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _listen(text: str | None) -> Endpoint | None:
    endpoint = _endpoint(text, "--listen", "ip:port")
    if endpoint is not None and not endpoint.is_literal:
        raise typer.BadParameter(
            f"a cluster listens on an IP address, got {endpoint.host!r}", param_hint="--listen"
        )
    return endpoint


def _checks(case: "Case", *, measures: bool) -> "dict[str, tuple[Check, ...]]":
    """All of them, by section, in the order of the screen."""
    from llm_datadist.cli.doctor import host, links, network, paths, peer, rdma

    return {
        **({"peer": (peer.running_cluster,)} if case.peer else {}),
        **({"speed": (links.paths,)} if measures else {}),
        "same host (cma)": (
            paths.foreign_memory, paths.yama, paths.capability, paths.pid_namespace,
        ),
        "network": (
            network.loopback, paths.listening, network.rank_tables, paths.link_security,
            paths.allowed_path,
        ),
        "other paths": (paths.nixl, rdma.devices, rdma.ucx_ways, paths.gpus),
        "limits": (
            host.descriptors, host.memory, host.shared_memory, host.locked_memory, host.huge_pages,
        ),
        "versions": (host.installed, host.system, host.extras),
    }  # fmt: skip


def _examine(
    case: "Case", checks: "dict[str, tuple[Check, ...]]", show: Callable[[str], None]
) -> "list[Section]":
    """Runs the checks; `show` is told which section is looked at."""
    from llm_datadist.cli.doctor.findings import Section
    from llm_datadist.cli.doctor.log import log_book

    sections = []
    with log_book():  # else the log would be printed among the findings
        for title, group in checks.items():
            show(title)
            findings = [finding for check in group for finding in _findings(check, case)]
            sections.append(Section(title, findings))
    return sections


def _findings(check: "Check", case: "Case") -> "Iterator[Finding]":
    from llm_datadist.cli.doctor.findings import Finding, State

    name = check.__name__.replace("_", " ")
    try:
        yield from check(case)
    except LLMException as error:
        yield Finding(name, State.PROBLEM, f"no cluster works here: {error}")
    except Exception as error:  # the others are worth having all the same
        found = f"could not be checked: {type(error).__name__}: {error}"
        yield Finding(name, State.PROBLEM, found, "if the rest is fine, please report this")
