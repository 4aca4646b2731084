"""The command `llm-datadist`: one module a verb. Heavy imports happen when a verb runs."""

from __future__ import annotations

import sys
from errno import ENOSPC

import typer

from llm_datadist import __version__
from llm_datadist.cli.bench.command import app as bench
from llm_datadist.cli.demo.command import demo
from llm_datadist.cli.docs.command import docs
from llm_datadist.cli.doctor.command import doctor
from llm_datadist.cli.terminal import drop_output, print_anywhere
from llm_datadist.cli.top.command import top


class _App(typer.Typer):
    def __call__(self, *args: object, **kwargs: object) -> object:
        print_anywhere()
        try:
            try:
                return super().__call__(*args, **kwargs)
            finally:
                sys.stdout.flush()
        except OSError as error:
            if error.errno != ENOSPC:
                raise
            drop_output()
            typer.secho("llm-datadist: the output cannot be written: the disk is full", err=True)
            raise SystemExit(2) from None


app = _App(
    name="llm-datadist",
    help="Moves the KV cache of large language models between processes.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # in which the lines of a docstring are not those of the screen
    pretty_exceptions_show_locals=False,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"llm-datadist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


app.command()(demo)
app.command()(doctor)
app.command()(top)
app.add_typer(bench, name="bench")
app.command()(docs)
