"""finalize while a name is looked up for ever leaves the loop's three descriptors open.

The steps of `Ending` share one deadline: "the waiters", which come first and wait for the look-up,
use all of it, and `Loop.close` then joins its thread for 0 s, raises LLM_TIMEOUT, and leaves the
loop unclosed ("unclosed event loop" when it is collected), although its thread ends at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edges.test_finalize_is_bounded import finalize_beside_a_silent_name_server

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import NodeProcess


def test_finalize_beside_a_silent_name_server_leaves_nothing_open(victim: NodeProcess) -> None:
    assert victim.call(finalize_beside_a_silent_name_server) == 0
