"""Movers: a few threads that help a caller with the parts of one large transfer.

Guaranteed: when `run` returns or raises, no part is running and none will. A part is done by
whoever takes it first, a helper or the caller; to take it is one step. However `run` ends - a part
that failed, a signal's exception in the caller - no helper begins a part from then on, and those
that are in one are waited for: after a failure as long as they take, each has a deadline of its
own; after any other exception what they wait for is cut (`Token.cut`), and no further exception
ends the wait (`Presence`), however many there are. So nothing arrives behind an exception. Where
the system gives no thread to help, the caller does all parts.

Any thread may call `run`, and many may at the same time; helpers that are busy with others are not
waited for. Rejected: futures (a caller that is interrupted while it waits for one leaves its lock
held, and the helper waits for that for ever), and leaving parts to run on behind an exception
(their memory may be given back by then).
"""

from __future__ import annotations

from _thread import start_new_thread
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

from llm_datadist.errors import LLMException
from llm_datadist.locks import holds_lock
from llm_datadist.running.bell import Latch
from llm_datadist.running.deadline import Token, given_up
from llm_datadist.running.presence import WAIT_FOR_ALL, Presence
from llm_datadist.running.threads import Errands, Threads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llm_datadist.running.deadline import Deadline

#: a part smaller than this costs more to hand to a thread than to move
MIN_PART_NBYTES = 1024 * 1024
_CALLER: Final = "the caller"
#: parts that helpers are asked for at a time
_MOST_WAITING: Final = 64


class Call:
    """One call of `Movers.run`, as its parts see it. Thread-safe."""

    __slots__ = ("is_over", "presence", "token")

    def __init__(self, token: Token) -> None:
        #: whose call it is
        self.token = token
        #: parts end soon, and no helper begins one
        self.is_over = False
        #: the helpers that are in a part
        self.presence = Presence()

    def require(self) -> None:
        """Raises LLMException when the call has been given up: parts look between two steps."""
        if self.is_over:
            raise given_up()
        self.token.require()


Task: TypeAlias = "Callable[[Call], None]"


class _Part:
    """A part of a transfer: taken once, by a helper or by the caller."""

    __slots__ = ("_taken_by", "error", "over", "task")

    def __init__(self, task: Task) -> None:
        self.task = task
        self._taken_by: dict[None, object] = {}
        self.over = Latch()
        self.error: BaseException | None = None

    def take(self, who: object) -> bool:
        """Whether it is theirs; it may have been before."""
        return self._taken_by.setdefault(None, who) is who

    def help(self, call: Call) -> None:
        """In a helper's thread."""
        if not call.presence.enter():
            return
        try:
            if not call.is_over and self.take(object()):
                self._do(call)
        finally:
            call.presence.leave()

    def _do(self, call: Call) -> None:
        try:
            self.task(call)
        except BaseException as error:  # raised again by the caller
            self.error = error
        finally:
            self.over.set()

    def wait(self) -> None:
        """Until no helper runs it, and none will."""
        if not self.take(_CALLER):
            self.over.wait(None)


class Movers:
    """Runs parts side by side: the caller's thread takes some, helpers the others. Thread-safe."""

    def __init__(self, threads: int, errands: Errands | None = None) -> None:
        self.threads = threads
        self._helpers = Threads(max(1, self.threads - 1), "llm-datadist-mover", errands)
        #: those that run
        self._calls: dict[Call, None] = {}
        self._is_stopped = False

    def parts_of(self, nbytes: int) -> int:
        return max(1, min(self.threads, nbytes // MIN_PART_NBYTES))

    def run(self, tasks: Sequence[Task], token: Token | None = None) -> None:
        """Runs all tasks and returns when none is running any more; raises the first failure.

        The token is that of the call which they are for, where they may wait for a peer.
        """
        call = Call(token or Token(()))
        try:
            self._calls[call] = None
            if self._is_stopped:
                call.token.cut()
            call.require()
            if len(tasks) == 1 or holds_lock():  # helpers may need that lock: no wait for them
                for task in tasks:
                    task(call)
            else:
                self._run([_Part(task) for task in tasks], call)
        finally:
            self._calls.pop(call, None)

    def _run(self, parts: Sequence[_Part], call: Call) -> None:
        try:
            self._do(parts, call)
        except LLMException:
            call.is_over = True
            WAIT_FOR_ALL(call.presence.lock)  # one step, which no signal cuts short
            raise
        except BaseException:
            call.is_over = True
            try:  # one step, too: in a thread of its own, which a further exception does not strike
                start_new_thread(call.token.cut, ())
            except RuntimeError:  # no thread is to be had
                call.token.cut()
            finally:
                WAIT_FOR_ALL(call.presence.lock)
            raise

    def _do(self, parts: Sequence[_Part], call: Call) -> None:
        try:
            self._ask_for_help(parts[1:], call)
            for part in parts:
                if part.take(_CALLER):
                    part.task(call)
        except LLMException:
            # one that failed by itself fails for the others, too, or they are done soon
            call.is_over = True
            for part in parts:
                part.wait()
            raise
        for part in parts:
            part.wait()
        for part in parts:
            if part.error is not None:
                raise part.error

    def stop(self) -> None:
        """What runs, and what is still to run, fails soon: the cluster is finalized."""
        self._is_stopped = True
        for call in list(self._calls):
            call.token.cut()

    def end(self, deadline: Deadline) -> None:
        """Ends the helpers. Raises LLMException(LLM_TIMEOUT)."""
        self._helpers.end(deadline)

    def _ask_for_help(self, parts: Sequence[_Part], call: Call) -> None:
        """None where all helpers are with peers that stand still: what asks is kept until then."""
        if self._helpers.num_waiting >= _MOST_WAITING:
            return
        try:
            for part in parts:
                self._helpers.start(partial(part.help, call))
        except LLMException:  # no thread is to be had
            return
