"""init where the system gives no thread at all: an LLMException that says so, and nothing is left.

It raises a bare RuntimeError out of `Loop.start`, in front of `Cluster.start`'s own clean-up: what
`Cluster.__init__` has opened stays open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edges.scarce import become_nobody, lift_limit, limit_threads
from edges.user import settings
from llm_datadist import LLMException, LLMRole
from llm_datadist.testing.timing import eventually
from soak.tally import descriptors

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node, NodeProcess


def start_again_and_again(node: Node) -> tuple[list[str], int]:
    """What init said, and how many descriptors are left of it."""
    become_nobody(23475)
    node.start(LLMRole.DECODER, 2, **settings("tcp"))
    node.stop()
    before = descriptors()
    limit_threads()
    said = []
    for _ in range(5):
        try:
            node.start(LLMRole.DECODER, 2, **settings("tcp"))
        except (LLMException, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    lift_limit()
    eventually(lambda: descriptors() <= before, 1.0)
    left = descriptors() - before
    node.start(LLMRole.DECODER, 2, **settings("tcp"))
    node.stop()
    return said, left


def test_init_without_any_thread_says_so_and_leaves_nothing(victim: NodeProcess) -> None:
    said, left = victim.call(start_again_and_again)
    assert [line for line in said if "no more threads" not in line] == []
    assert len(said) == 5
    assert left == 0
