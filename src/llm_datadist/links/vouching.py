"""Asking a linked peer whether a call is its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Vouching:
    """What one peer was asked, and has not answered. Belongs to the loop's thread."""

    def __init__(self, ask: Callable[[bytes], Awaitable[object]]) -> None:
        """`ask` sends the question."""
        self._ask = ask
        self._asked: dict[bytes, asyncio.Future[bool | None]] = {}

    async def vouches_for(self, call: bytes, timeout_s: float) -> bool | None:
        """Whether the peer says that a call is its own; None when it says nothing in time."""
        answer = self._asked.get(call)
        if answer is None:
            answer = self._asked[call] = asyncio.get_running_loop().create_future()
            await self._ask(call)
        await asyncio.wait([answer], timeout=timeout_s)
        return answer.result() if answer.done() else None

    def learn(self, call: bytes, is_theirs: bool | None) -> None:
        """The peer's answer, or None: there will be none."""
        answer = self._asked.pop(call, None)
        if answer is not None:
            answer.set_result(is_theirs)

    def close(self) -> None:
        """The link is no more."""
        for call in tuple(self._asked):
            self.learn(call, None)
