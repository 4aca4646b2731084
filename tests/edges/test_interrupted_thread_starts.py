"""Interruptions of calls that start helper threads leave threads behind, also after finalize.

`Thread.start` is Python code: an exception of a signal's handler behind its first step leaves the
thread running, and the pool that started it without it (`Threads._has_started`), so that `end` does
not end it; or the thread itself is lost on its way (`KeyError` of `_limbo`, or it waits for ever in
`_started.set`). The program may also get a `KeyError` of `threading` in place of its own exception.
With the fault mended, `warm_up` and `is_warm` of edges/interrupting.py can go.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

import effort
from edges.interrupting import Strikes, run
from edges.user import start_owner
from llm_datadist.running.threads import start_thread

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node, NodeProcess


@pytest.mark.parametrize("names", [["pull"], ["transfer"], ["copy", "swap"]])
def test_after_hundreds_of_interruptions_no_thread_is_left(
    peer: NodeProcess, victim: NodeProcess, path: str, names: list[str]
) -> None:
    port = peer.call(start_owner, path)
    count = effort.rounds(600)
    victim.begin(run, path, port, names, count, is_warm=False)
    assert victim.result(60) == (count, [], [])


def start_threads() -> None:
    for _ in range(20):
        start_thread(lambda: None, "a thread")


def struck_starts(_node: Node) -> set[str]:
    """What comes out where an exception strikes in `threading`."""
    strikes, draw, came = Strikes(files=["threading.py"]), random.Random(1), set()
    for _ in range(effort.rounds(3000)):
        error = strikes.within(start_threads, draw.uniform(1e-5, 1e-3), 2e-5)
        if strikes.count:
            came.add(repr(error))
    return came


def test_an_interrupted_start_raises_what_the_handler_did(victim: NodeProcess) -> None:
    assert "RuntimeError('release unlocked lock')" not in victim.call(struck_starts)
