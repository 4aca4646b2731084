"""A signal's handler that raises TimeoutError, as alarms do: an OSError, but no system call's."""

from __future__ import annotations

import random
import signal
from typing import TYPE_CHECKING

from edges.user import EVERY, KEY, SMALL, SUCCESS, settings, start_owner
from llm_datadist import LLMException, LLMRole

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node, NodeProcess

STRIKES = 400
LONGEST_S = 4e-4
#: more pulls than the longest delay has room for
MANY = 1000


def pull_under_alarms(node: Node, path: str, port: int) -> tuple[int, list[str]]:
    """How many alarms came out as what they are, and what else came out. In a main thread."""

    def strike(*_: object) -> None:
        raise TimeoutError("my alarm")

    node.start(LLMRole.DECODER, 2, **settings(path))
    assert node.link(port, 1) is SUCCESS
    cache, draw = node.blocks_cache(*SMALL), random.Random(1)
    signal.signal(signal.SIGALRM, strike)
    alarms, others = 0, []
    for _ in range(STRIKES):
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(2e-5, LONGEST_S))
                for _ in range(MANY):
                    node.manager.pull_blocks(KEY, cache, EVERY, EVERY)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except TimeoutError as error:
            alarms += str(error) == "my alarm"
        except LLMException as error:
            others.append(str(error))
    return alarms, others


def test_a_time_out_of_the_programs_own_is_passed_on(
    peer: NodeProcess, victim: NodeProcess, path: str
) -> None:
    port = peer.call(start_owner, path, shape=SMALL)
    alarms, others = victim.call(pull_under_alarms, path, port)
    assert others == []
    assert alarms >= STRIKES - 2  # one may strike where no exception passes: a finalizer
