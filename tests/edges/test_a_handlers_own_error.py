"""A signal's handler that raises TimeoutError, as alarms do, or what else may mean something."""

from __future__ import annotations

import queue
import random
import signal
import sys
from typing import TYPE_CHECKING, Any

import effort
from certificates import Authority
from edges.interrupting import Strikes
from edges.user import SMALL, SUCCESS, User, start_owner
from llm_datadist import LLMException, LLMStatusCode
from llm_datadist.link_security import LinkSecurity
from llm_datadist.testing.timing import eventually
from llm_datadist.transport.shields import Shields
from llm_datadist.transport.tls import Tls

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import FrameType

    from llm_datadist.testing.cluster import Node, NodeProcess

STRIKES = effort.rounds(400)
#: each has a meaning to some code that waits
KINDS = (RuntimeError, TimeoutError, BlockingIOError, IndexError, queue.Empty, ValueError, KeyError)
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


LINKED = (SUCCESS, LLMStatusCode.LLM_ALREADY_LINK)


class Own(Exception):
    """No kind that the library, or Python's own, has a meaning for."""


def kinds_that_were_lost(node: Node, path: str, port: int) -> dict[str, set[str]]:
    """By what was called and the handler's exception: what came out instead."""
    user, draw = User(node, path, port, 2000, SMALL), random.Random(1)
    lost: dict[str, set[str]] = {}

    def relink() -> None:
        node.unlink(port, 1)
        node.link(port, 1)

    def register() -> None:
        node.manager.unregister_cache(node.blocks_cache(*SMALL).cache_id)

    calls = {"link": (relink, 3e-3), "pull": (user.pull, 4e-4), "register": (register, 4e-4)}
    for name, (call, longest_s) in calls.items():
        for kind in (Own, *KINDS):
            strikes = Strikes(kind)
            for _ in range(STRIKES):
                came = strikes.within(call, draw.uniform(2e-5, longest_s))
                missed = strikes.count - strikes.unraisable
                strikes.unraisable = 0
                if missed > 0 and type(came) is not kind:
                    lost.setdefault(f"{name} {kind.__name__}", set()).add(repr(came))
                if name == "link":  # a link may have been made behind the exception
                    assert eventually(lambda: node.link(port, 1) in LINKED)
    return lost


def test_what_a_handler_raises_comes_out_whatever_its_type(
    peer: NodeProcess, victim: NodeProcess
) -> None:
    victim.begin(kinds_that_were_lost, "tcp", peer.call(start_owner, "tcp", shape=SMALL))
    assert victim.result(100) == {}


def out_of_a_hand_shake_of_tls(node: Node, security: LinkSecurity) -> str:
    """What came, where a handler raised ValueError while the end of a hand-shake was at work."""
    shields = Shields(security)

    def strike(_: int, frame: FrameType | None) -> None:
        outer = frame and frame.f_back  # of a function of Python's `ssl`
        if outer is not None and outer.f_code is Tls.answer.__code__:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise ValueError("struck")

    signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    try:
        for _ in range(MANY):
            caller, listener = shields.make(is_caller=True), shields.make(is_caller=False)
            listener.answer(caller.answer(listener.answer(caller.start())))
    except Exception as error:
        return repr(error)
    return "nothing"


def test_what_a_handler_raises_is_no_fault_of_a_certificate(
    victim: NodeProcess, tmp_path: Path
) -> None:
    """A stream is dialled, and its hand-shake made, in the thread of the call that needs it."""
    files = [str(file) for file in Authority().issue(tmp_path)]
    security = LinkSecurity(None, "", *files)
    assert victim.call(out_of_a_hand_shake_of_tls, security) == "ValueError('struck')"
