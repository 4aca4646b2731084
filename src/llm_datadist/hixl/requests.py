"""Requests: asynchronous transfers, from their beginning until the program has asked for the end.

Guaranteed: a request's end is set once, and none is COMPLETED but by a transfer that returned. A
request that waits for a thread may be taken back, by `give_up`; then it is never begun. To take it,
either way, is one step. One that runs learns that it is given up where it begins to use a
connection (`require`): whoever gives up first and cuts the connections then has ended it.

An end is told once, and to nobody is as good as never: what an interrupted call had taken to tell
is put back.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Final

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.hixl.call import Exhausted
from llm_datadist.hixl.types import TransferResult, TransferStatus
from llm_datadist.observe.log import get_logger
from llm_datadist.running.bell import Bell
from llm_datadist.running.shares import Shares
from llm_datadist.running.threads import Threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.core.by_address import ByAddress
    from llm_datadist.hixl.names import EngineName
    from llm_datadist.running.deadline import Deadline
    from llm_datadist.running.threads import Errands

#: so many transfers run at a time, and so many to one peer: one that stands still costs the others
#: nothing
_THREADS: Final = 64
_OF_ONE: Final = 4
#: requests whose end nobody has asked for
MAX_REQUESTS: Final = 65536
#: the threads of what a disconnect has ended are about to say so
_SETTLING_S: Final = 1.0


class Request:
    """One asynchronous transfer. Thread-safe."""

    __slots__ = ("_ends", "_takers", "is_given_up", "name", "number", "pieces", "user_data")

    def __init__(self, number: int, name: EngineName, pieces: ByAddress, user_data: int) -> None:
        self.number = number
        self.name = name
        #: None when it has ended
        self.pieces: ByAddress | None = pieces
        self.user_data = user_data
        #: nobody wants it any more, also if it runs
        self.is_given_up = False
        #: who carries it out, or has taken it back
        self._takers: dict[None, object] = {}
        self._ends: dict[None, TransferStatus] = {}

    @property
    def status(self) -> TransferStatus:
        return self._ends.get(None, TransferStatus.WAITING)

    def require(self) -> None:
        """Raises LLMException when it is not to begin, or go on elsewhere."""
        if self.is_given_up:
            raise LLMException(
                "the connection was ended by disconnect", LLMStatusCode.LLM_NOT_YET_LINK
            )

    def take(self) -> bool:
        """Whether the caller is the first."""
        me = object()
        return self._takers.setdefault(None, me) is me

    def end(self, status: TransferStatus) -> None:
        """By whoever has taken it."""
        self._ends.setdefault(None, status)
        self.pieces = None


class Requests:
    """Those of one engine. Thread-safe."""

    def __init__(
        self,
        carry_out: Callable[[EngineName, ByAddress, Callable[[], None]], None],
        errands: Errands,
        before: int = 0,
    ) -> None:
        """Numbers are above `before`. `carry_out` does one, and returns when all has been moved.

        What it is given last it calls when it has entered a connection, and that raises if the
        request is given up.
        """
        self._carry_out = carry_out
        self._errands = errands
        self._threads = Threads(_THREADS, "llm-datadist-transfer")
        self._shares = Shares(self._threads, _OF_ONE)
        self._numbers = itertools.count(before + 1)
        #: by number, until its end was asked for
        self._requests: dict[int, Request] = {}
        #: rung when one has ended
        self._bell = Bell()
        self._is_ended = False

    def begin(self, name: EngineName, pieces: ByAddress, user_data: int) -> int:
        """A thread does it when it is its turn.

        Raises Exhausted, and LLMException(LLM_FAILED) behind `end`; nothing is moved then.
        """
        if len(self._requests) >= MAX_REQUESTS:
            raise Exhausted(
                f"{MAX_REQUESTS} transfers have been begun and not asked for: get_transfer_status "
                "or get_all_transfer_status lets go of those that have ended"
            )
        request = Request(next(self._numbers), name, pieces, user_data)
        return self._errands.run(partial(self._start, request), lambda _: self._drop(request))

    def _start(self, request: Request) -> int:
        self._requests[request.number] = request
        try:
            self._shares.start(request.name, partial(self._do, request))
        except LLMException as error:
            self._drop(request)
            if self._is_ended:
                raise
            raise Exhausted(str(error)) from error
        return request.number

    def _drop(self, request: Request) -> None:
        """Nobody has its number. One that runs is told of at its end, as others are."""
        if self._give_up(request):
            self._requests.pop(request.number, None)

    def status_of(self, number: int) -> TransferStatus | None:
        """None for one that there is not, or not any more: an end is told once."""
        request = self._requests.get(number)
        if request is None:
            return None
        told = self._tell([(request, request.status)])
        return told[0].status if told else None  # another thread was told

    def results(self, most: int, *, is_waiting_skipped: bool) -> list[TransferResult]:
        """The oldest ones, those that have ended for the last time."""
        seen: list[tuple[Request, TransferStatus]] = []
        for number in sorted(self._requests):  # what was put back is not the newest
            if len(seen) >= most:
                break
            request = self._requests.get(number)
            if request is None:
                continue
            status = request.status
            if not (is_waiting_skipped and status is TransferStatus.WAITING):
                seen.append((request, status))
        return self._tell(seen)

    def _tell(self, seen: list[tuple[Request, TransferStatus]]) -> list[TransferResult]:
        """Those that nobody was told the end of yet; where one has ended it is told now."""

        def tell() -> list[TransferResult]:
            return [
                TransferResult(each.number, each.user_data, status)
                for each, status in seen
                if status is TransferStatus.WAITING
                or self._requests.pop(each.number, None) is not None
            ]

        def put_back(told: list[TransferResult]) -> None:
            numbers = {each.req for each in told if each.status is not TransferStatus.WAITING}
            self._requests.update((each.number, each) for each, _ in seen if each.number in numbers)

        if all(status is TransferStatus.WAITING for _, status in seen):
            return tell()  # as ever: it takes nothing out
        return self._errands.run(tell, put_back)

    def give_up(self, name: EngineName | None = None) -> None:
        """Those that wait for a thread, of one peer or of all, have failed; others will, soon."""
        for request in list(self._requests.values()):
            if name in (None, request.name):
                self._give_up(request)
        self._bell.ring()

    def settle(self, name: EngineName) -> None:
        """Waits for the ends of what was cut."""
        mine = [each for each in list(self._requests.values()) if each.name == name]

        def is_over() -> bool:
            return all(each.status is not TransferStatus.WAITING for each in mine)

        self._bell.wait_until(is_over, _SETTLING_S)

    def end(self, deadline: Deadline) -> None:
        """Begins none any more, and ends the threads. Raises LLMException(LLM_TIMEOUT)."""
        self._is_ended = True
        self._threads.end(deadline)

    def _give_up(self, request: Request) -> bool:
        """Whether it had not begun, and never will."""
        request.is_given_up = True
        is_first = request.take()
        if is_first:
            request.end(TransferStatus.FAILED)
        return is_first

    def _do(self, request: Request) -> None:
        """In a thread of ours."""
        if not request.take():
            return
        status, pieces = TransferStatus.FAILED, request.pieces
        assert pieces is not None
        try:
            self._carry_out(request.name, pieces, request.require)
            status = TransferStatus.COMPLETED
        except LLMException as error:
            get_logger().error("transfer %d has failed: %s", request.number, error)
        finally:
            request.end(status)
            self._bell.ring()
