"""Asking a linked peer whether a connection is its own.

It has a second to answer, however little time the one has who makes us ask: a peer that is busy is
not gone. One that has left a question open for longer is not waited for again. Only so many are
asked at a time: strangers decide how many there are.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

#: a peer that takes longer is taken for gone
ANSWER_S: Final = 1.0
_MOST_ASKED: Final = 256


class Vouching:
    """What one peer was asked, and has not answered. Belongs to the loop's thread."""

    def __init__(self, ask: Callable[[str], Awaitable[object]]) -> None:
        """`ask` sends the question, and does not wait."""
        self._ask = ask
        self._asked: dict[str, asyncio.Future[bool | None]] = {}
        #: since when nothing was answered, of what is open
        self._silent_since: float | None = None

    async def vouches_for(self, connection: str) -> bool | None:
        """Whether the peer says that it is its own; None when it says nothing.

        False, too, when it is asked too much, and has not been silent for long.
        """
        loop = asyncio.get_running_loop()
        if self._silent_since is None:
            self._silent_since = loop.time()
        elif loop.time() >= self._silent_since + ANSWER_S:
            return None
        answer = self._asked.get(connection)
        if answer is None:
            if len(self._asked) >= _MOST_ASKED:
                return False
            answer = self._asked[connection] = loop.create_future()
            await self._ask(connection)
        await asyncio.wait([answer], timeout=ANSWER_S)
        return answer.result() if answer.done() else None

    def learn(self, connection: str, is_theirs: bool | None) -> None:
        """The peer's answer, or None: there will be none."""
        answer = self._asked.pop(connection, None)
        if answer is not None:
            self._silent_since = asyncio.get_running_loop().time() if self._asked else None
            answer.set_result(is_theirs)

    def close(self) -> None:
        """The link is no more."""
        for connection in tuple(self._asked):
            self.learn(connection, None)
