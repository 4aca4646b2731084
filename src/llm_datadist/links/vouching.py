"""Asking a linked peer whether a connection is its own, and how long it may be silent.

Whoever makes us ask waits a second for the answer, however little time it has itself: a peer that
is busy is not gone. Then it is not taken for gone, either, unless the kernel says so: on one host
that its process is stopped, and of another host that it has not even taken the question (its TCP
acknowledges, however busy its processes are). The question stays open, and whoever comes next makes
us ask again; a peer that has answered nothing for ten seconds is gone: an interpreter that is kept
by one long call answers late. Each answer begins the time anew.

Only so many are asked at a time: strangers decide how many there are.
"""

from __future__ import annotations

import asyncio
import enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

#: so long one is waited for
ANSWER_S: Final = 1.0
#: a peer that leaves a question open for longer is taken for gone
SILENCE_S: Final = 10.0
_MOST_ASKED: Final = 256


class Answer(enum.Enum):
    """What a peer says of a connection."""

    OURS = "it is its own"
    OTHERS = "it is not"
    BUSY = "nothing yet"
    GONE = "nothing, and will not"


class Vouching:
    """What one peer was asked, and has not answered. Belongs to the loop's thread."""

    def __init__(
        self, ask: Callable[[bytes], Awaitable[object]], is_known_gone: Callable[[], bool]
    ) -> None:
        """`ask` sends the question, and does not wait. `is_known_gone`: a kernel says so."""
        self._ask = ask
        self._is_known_gone = is_known_gone
        self._asked: dict[bytes, asyncio.Future[Answer]] = {}
        #: since when nothing was answered, of what is open
        self._silent_since: float | None = None

    @property
    def silence_s(self) -> float:
        """How long the peer has left a question open."""
        since = self._silent_since
        return 0.0 if since is None else asyncio.get_running_loop().time() - since

    async def vouches_for(self, connection: bytes) -> Answer:
        """Whether the peer says that it is its own."""
        if self._silent_since is None:
            self._silent_since = asyncio.get_running_loop().time()
        elif self.silence_s >= (ANSWER_S if self._is_known_gone() else SILENCE_S):
            return Answer.GONE
        answer = self._asked.get(connection)
        if answer is None:
            if len(self._asked) >= _MOST_ASKED:
                return Answer.BUSY
            answer = self._asked[connection] = asyncio.get_running_loop().create_future()
            await self._ask(connection)
        await asyncio.wait([answer], timeout=ANSWER_S)
        if answer.done():
            return answer.result()
        is_gone = self.silence_s >= SILENCE_S or self._is_known_gone()
        return Answer.GONE if is_gone else Answer.BUSY

    def learn(self, connection: bytes, is_theirs: bool) -> None:
        """The peer's answer."""
        self._settle(connection, Answer.OURS if is_theirs else Answer.OTHERS)

    def close(self) -> None:
        """The link is no more."""
        for connection in list(self._asked):
            self._settle(connection, Answer.GONE)

    def _settle(self, connection: bytes, said: Answer) -> None:
        answer = self._asked.pop(connection, None)
        if answer is not None:
            self._silent_since = asyncio.get_running_loop().time() if self._asked else None
            answer.set_result(said)
