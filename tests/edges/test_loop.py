"""The loop's thread begins nothing that it has no time left for."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.running.deadline import Deadline
from llm_datadist.running.loop import Loop

if TYPE_CHECKING:
    from collections.abc import Coroutine


async def _forever() -> None:
    await asyncio.Event().wait()


def test_what_is_spawned_runs_and_is_cancelled_with_the_loop() -> None:
    loop, began, ended = Loop(), threading.Event(), threading.Event()

    async def work() -> None:
        began.set()
        try:
            await _forever()
        finally:
            ended.set()

    loop.start()
    loop.spawn(work)
    assert began.wait(5)
    loop.close(Deadline.after(5))
    assert ended.is_set()


def test_what_is_spawned_behind_the_order_to_stop_is_not_made() -> None:
    """The loop's thread is busy when it is told to stop, and so gets both orders together."""
    loop, busy, free = Loop(), threading.Event(), threading.Event()
    made: list[str] = []

    def make() -> Coroutine[object, object, None]:
        made.append("a coroutine")
        return _forever()

    def be_busy() -> None:
        busy.set()
        free.wait(5)

    loop.start()
    loop.call_soon(be_busy)
    assert busy.wait(5)
    with pytest.raises(LLMException) as error:
        loop.close(Deadline.after(0))
    assert error.value.status_code is LLMStatusCode.LLM_TIMEOUT
    loop.spawn(make)
    free.set()
    loop.close(Deadline.after(5))
    assert made == []
