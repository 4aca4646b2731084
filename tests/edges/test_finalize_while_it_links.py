"""Calls that the cluster's loop carries out, while the cluster is finalized: they end.

They hang for ever: `Loop.run` hands a job to the loop between `cancel_all` and `Loop.close`; the
loop stops before the job has begun, and nobody sets its latch.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from edges.test_life import listening_ports
from edges.user import SMALL, settings, start_owner
from llm_datadist import LLMException, LLMRole
from llm_datadist.testing.timing import takes_at_most
from soak.stage import Doing

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.testing.cluster import Node, NodeProcess

LISTEN = {"llm.listenIpInfo": "127.0.0.1:0"}


def finalize_meanwhile(node: Node, verb: str, port: int, rounds: int) -> list[str]:
    """Two threads call again and again while the cluster is finalized; what was wrong."""
    wrong = []
    for _ in range(rounds):
        node.start(LLMRole.MIX, 2, **settings("tcp"))
        calls: dict[str, Callable[[], object]] = {
            "switch": lambda: node.datadist.switch_role(LLMRole.PROMPT, LISTEN),
            "link": lambda: (node.link(port, 1), node.unlink(port, 1)),
            "cut": lambda: node.unlink(port, 1, force=True),
        }
        began = threading.Event()

        def work(call: Callable[[], object], began: threading.Event) -> str:
            began.set()
            try:
                while True:
                    call()
            except (LLMException, RuntimeError) as error:
                return str(error)

        threads = [Doing(lambda: work(calls[verb], began)) for _ in range(2)]  # noqa: B023
        assert began.wait(10)
        with takes_at_most(5):
            node.datadist.finalize()
        for thread in threads:
            thread.result(10)
        if ports := listening_ports(node):
            wrong.append(f"finalized, and listening on {ports}")
    return wrong


@pytest.mark.parametrize("verb", ["switch", "link", "cut"])
def test_calls_end_when_the_cluster_is_finalized_meanwhile(
    peer: NodeProcess, victim: NodeProcess, verb: str
) -> None:
    port = peer.call(start_owner, "tcp", shape=SMALL)
    assert victim.call(finalize_meanwhile, verb, port, 30) == []
