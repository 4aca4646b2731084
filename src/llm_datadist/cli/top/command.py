"""The verb `top`: its options, and its exit codes.

0: every cluster answered, or `q` or Ctrl-C ended the view. 2: wrong usage. 3: with --once or
--json, a cluster did not answer.
"""

# No `from __future__ import annotations`: typer reads the types when it runs.

import json as jsonlib
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from llm_datadist.cli.top.order import Order

if TYPE_CHECKING:
    from llm_datadist.cli.top.samples import Sample

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
    sort: Annotated[
        Order, typer.Option(metavar="BY", help=f"What comes first: {', '.join(Order)}.")
    ] = Order.SPEED,
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

    On a terminal: `q` quits, `s` sorts by the next column, `r` turns the order round, `j`, `k`,
    arrows and page keys scroll, the space bar pauses.

    More: `llm-datadist docs observability`.

    Exit code 0: every cluster answered, or `q` or Ctrl-C; 2: wrong usage; 3: with --once or
    --json, a cluster did not answer, or with what is no answer.
    """
    from llm_datadist.cli.top.live import watch
    from llm_datadist.cli.top.samples import take_samples
    from llm_datadist.endpoint import Endpoint
    from llm_datadist.errors import LLMException
    from llm_datadist.options import read_link_security

    try:
        endpoints = [Endpoint.parse(text) for text in clusters]
        security = read_link_security({})
        take = partial(take_samples, endpoints, security, timeout)
        if not (json or once):
            watch(take, interval, sort)
            return
        samples = take()
    except (LLMException, ValueError) as error:
        typer.secho(f"top: {error}", fg="red", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        return
    if json:
        typer.echo(_to_json(samples))
    else:
        _print(samples, sort)
    if any(each.stats is None for each in samples):
        raise typer.Exit(_NO_ANSWER)


def _print(samples: "list[Sample]", order: Order) -> None:
    from rich.console import Console

    from llm_datadist.cli.top.view import view

    Console(width=None if sys.stdout.isatty() else _WIDTH).print(view(samples, {}, order))


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
