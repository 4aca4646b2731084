"""The verb `top`: its options, and its exit codes.

0: every cluster answered, or Ctrl-C ended the view. 2: wrong usage. 3: with --once or --json, a
cluster did not answer.
"""

# No `from __future__ import annotations`: typer reads the types when it runs.

import json as jsonlib
import sys
import time
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from llm_datadist.cli.top.view import Sample
    from llm_datadist.endpoint import Endpoint
    from llm_datadist.link_security import LinkSecurity

_NO_ANSWER = 3
_LONGEST_S = 24 * 3600.0
#: of a table that goes to a file or a pipe
_WIDTH = 200


def top(
    clusters: Annotated[
        list[str], typer.Argument(metavar="HOST:PORT", help="Where the clusters listen.")
    ],
    interval: Annotated[
        float, typer.Option(min=0.1, max=_LONGEST_S, help="Seconds between looks.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one table and exit.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print all figures once and exit.")] = False,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=_LONGEST_S, help="Seconds that an answer may take.")
    ] = 2.0,
) -> None:
    """Watch running clusters: links, throughput, latency, pools and keys.

    Clusters answer without being linked. Those with link security want the same one here, in the
    environment variable LLM_DATADIST_LINK_SECURITY. Figures of operations need metrics to be on in
    the cluster (LLM_DATADIST_METRICS=1); --once gives them since the cluster was initialised.

    Exit code 0: every cluster answered, or Ctrl-C; 2: wrong usage; 3: with --once or --json, a
    cluster did not answer, or with what is no answer.
    """
    from llm_datadist.cli.top.view import take_samples
    from llm_datadist.endpoint import Endpoint
    from llm_datadist.errors import LLMException
    from llm_datadist.options import read_link_security

    try:
        endpoints = [Endpoint.parse(text, "HOST:PORT") for text in clusters]
        security = read_link_security({})
        if not (json or once):
            _watch(endpoints, security, timeout, interval)
        samples = take_samples(endpoints, security, timeout)
    except (LLMException, ValueError) as error:
        typer.secho(f"top: {error}", fg="red", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        return
    if json:
        typer.echo(_to_json(samples))
    else:
        _print(samples)
    if any(each.stats is None for each in samples):
        raise typer.Exit(_NO_ANSWER)


def _print(samples: "list[Sample]") -> None:
    from rich.console import Console

    from llm_datadist.cli.top.view import view

    Console(width=None if sys.stdout.isatty() else _WIDTH).print(view(samples, {}))


def _watch(
    endpoints: "list[Endpoint]",
    security: "LinkSecurity | None",
    timeout_s: float,
    interval_s: float,
) -> "NoReturn":
    """Until Ctrl-C."""
    from rich.live import Live

    from llm_datadist.cli.top.view import take_samples, view

    samples = take_samples(endpoints, security, timeout_s)
    with Live(view(samples, {}), screen=sys.stdout.isatty(), auto_refresh=False) as live:
        while True:
            before = {each.endpoint: each.stats for each in samples if each.stats is not None}
            time.sleep(interval_s)
            samples = take_samples(endpoints, security, timeout_s)
            live.update(view(samples, before), refresh=True)


def _to_json(samples: "list[Sample]") -> str:
    import msgspec

    from llm_datadist.core.stats import BOUNDS_S

    answers = [
        {"address": str(each.endpoint), "problem": each.problem}
        if each.stats is None
        else {"address": str(each.endpoint), "stats": msgspec.to_builtins(each.stats)}
        for each in samples
    ]
    return jsonlib.dumps(
        {"histogram_bounds_s": BOUNDS_S, "clusters": answers}, indent=1, allow_nan=False
    )
