"""What ends a command early, and how it says so: in a line or two, and by its exit code."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator


class CommandError(Exception):
    """The command cannot go on. The message is for the terminal, and says what to do."""

    exit_code = 1


class SetupError(CommandError):
    """Something that the user can put right stands in the way: an option, a package, a port."""

    exit_code = 2


@contextmanager
def explained(verb: str) -> Iterator[None]:
    """Shows a CommandError's message in place of a traceback, and exits with its code."""
    try:
        yield
    except CommandError as error:
        typer.secho(f"{verb}: {error}", fg="red", err=True)
        raise typer.Exit(error.exit_code) from None
