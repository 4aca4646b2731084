"""Errors of the system, told from those that a signal's handler raises while one waits.

Time-outs of test runners and alarms of programs are often a TimeoutError out of a handler, which is
an OSError, too, but no system call's: it has no number. Whoever catches OSError in a thread of the
program passes it on.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def pass_on_handlers(error: OSError) -> None:
    """Raises the error again if no system call has failed."""
    if error.errno is None:
        raise error


@contextmanager
def refusals_ignored() -> Iterator[None]:
    """What the system refuses in here is left undone."""
    try:
        yield
    except OSError as error:
        pass_on_handlers(error)
