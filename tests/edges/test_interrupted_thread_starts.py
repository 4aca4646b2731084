"""Interruptions of calls that start helper threads leave threads behind, also after finalize.

`Thread.start` is Python code: an exception of a signal's handler behind its first step leaves the
thread running, and the pool that started it without it (`Threads._has_started`), so that `end` does
not end it; or the thread itself is lost on its way (`KeyError` of `_limbo`, or it waits for ever in
`_started.set`). The program may also get a `KeyError` of `threading` in place of its own exception,
or an LLMException that says "no more threads (release unlocked lock)". With the fault mended,
`warm_up` and `is_warm` of edges/interrupting.py can go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from edges.interrupting import run
from edges.user import start_owner

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import NodeProcess


@pytest.mark.parametrize("names", [["pull"], ["transfer"], ["copy", "swap"]])
def test_after_hundreds_of_interruptions_no_thread_is_left(
    peer: NodeProcess, victim: NodeProcess, path: str, names: list[str]
) -> None:
    port = peer.call(start_owner, path)
    victim.begin(run, path, port, names, 600, is_warm=False)
    assert victim.result(60) == (600, [], [])
