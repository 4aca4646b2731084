"""What a forked child says."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

CHILD_S = 20.0


def in_child(work: Callable[[], str]) -> str:
    """What work says in a forked child, which then ends without any clean-up."""
    to_read, to_write = os.pipe()
    child = os.fork()
    if not child:
        try:
            text = work()
        except BaseException as error:
            text = repr(error)
        os.write(to_write, text.encode())
        os._exit(0)
    os.close(to_write)
    with open(to_read) as pipe:
        ended: list[int] = []
        has_ended = eventually(lambda: bool(_reap(child, ended)), CHILD_S)
        if not has_ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "the child hangs"
        return pipe.read()


def _reap(child: int, ended: list[int]) -> list[int]:
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        ended.append(status)
    return ended
