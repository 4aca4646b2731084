"""The verb `docs`: the pages of the documentation, on the terminal.

0: shown. 2: there is no such page or section.
"""

# No `from __future__ import annotations`: typer reads the types when it runs.

import os
import sys
from typing import Annotated

import typer

from llm_datadist.cli.failure import explained

#: text is hard to read on longer lines
_WIDTH = 100


def docs(
    page: Annotated[
        str,
        typer.Argument(
            metavar="PAGE",
            help="A page, as security; a section of it, as security#renew-them, which is how links "
            "are printed; a section of the specification, as 6.9, or a decision, as O19.",
            show_default=False,
        ),
    ] = "",
) -> None:
    """Read the documentation of this release; without PAGE, list its pages.

    On a terminal, what does not fit goes through the pager (`PAGER`, or less). Elsewhere it is
    Markdown, a line for each message: `llm-datadist docs messages | grep WORD`.

    Exit code 0: shown; 2: there is no such page or section.
    """
    from llm_datadist.cli.docs.pages import find

    with explained("docs"):
        text = find(page) if page else _contents()
    if sys.stdout.isatty():
        _show(text)
    else:
        typer.echo(text, nl=False)


def _contents() -> str:
    from llm_datadist.cli.docs.pages import pages

    rows = (f"| {name} | {page.title} |\n" for name, page in pages().items())
    return f"| page | what it is |\n| -- | -- |\n{''.join(rows)}"


def _show(text: str) -> None:
    from rich.console import Console

    from llm_datadist.cli.docs.screen import rendered

    console = Console()
    console.width = min(console.width, _WIDTH)
    shown = rendered(text)
    if len(console.render_lines(shown)) < console.height:
        console.print(shown)
        return
    os.environ.setdefault("LESS", "-R")  # else it shows the codes of colours
    with console.pager(styles=True):
        console.print(shown)
