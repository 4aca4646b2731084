"""A signal's handler that raises TimeoutError, as alarms do: an OSError, but no system call's."""

from __future__ import annotations

import random
import signal
import sys
from typing import TYPE_CHECKING, Any

from edges.user import SMALL, User, start_owner
from llm_datadist import LLMException

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.testing.cluster import Node, NodeProcess

STRIKES = 400
LONGEST_S = 4e-4
#: more calls than the longest delay has room for
MANY = 10_000


class Alarms:
    """Strike while something is called over and over; in a main thread."""

    def __init__(self) -> None:
        self.draw = random.Random(1)
        #: struck where no exception passes: in a finalizer
        self.unraisable = 0
        signal.signal(signal.SIGALRM, self._strike)
        sys.unraisablehook = self._count

    def within(self, call: Callable[[], object]) -> BaseException | None:
        """What came out, as it is handed on; None when the alarm did not."""
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, self.draw.uniform(2e-5, LONGEST_S))
                for _ in range(MANY):
                    call()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except (OSError, LLMException) as error:
            return error
        return None

    def _strike(self, *_: object) -> None:
        raise TimeoutError("my alarm")

    def _count(self, _: Any) -> None:
        self.unraisable += 1


def struck(node: Node, path: str, port: int, verb: str) -> tuple[int, set[str]]:
    """How many alarms were lost, and what else came out."""
    user, alarms = User(node, path, port, shape=SMALL), Alarms()
    came = [alarms.within(user.verbs[verb]) for _ in range(STRIKES)]
    lost = came.count(None) - alarms.unraisable
    return lost, {repr(error) for error in came if error is not None}


def test_a_time_out_of_the_programs_own_is_passed_on(
    peer: NodeProcess, victim: NodeProcess, path: str
) -> None:
    port = peer.call(start_owner, path, shape=SMALL)
    for verb in ("pull", "push", "copy", "swap"):
        lost, others = victim.call(struck, path, port, verb)
        assert (verb, lost, others) == (verb, 0, {"TimeoutError('my alarm')"})
        victim.call(ended)


def ended(node: Node) -> None:
    node.datadist.finalize()
