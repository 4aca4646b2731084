"""Steps on their way from the engine's thread, which waits for nothing, to one that carries out."""

from __future__ import annotations

import logging
import os
import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.integrations.vllm.step import Step


logger = logging.getLogger(__name__)


class Orders:
    """Carries out each step once, one after the other, in a thread of its own. Thread-safe."""

    def __init__(self, carry_out: Callable[[Step], None]) -> None:
        self._carry_out = carry_out
        self._process = os.getpid()
        self._steps: SimpleQueue[Step | None] = SimpleQueue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="kv-orders", daemon=True)
        self._thread.start()

    @property
    def is_inherited(self) -> bool:
        """Whether the thread is another process's, from which this one was forked."""
        return os.getpid() != self._process

    def put(self, step: Step) -> None:
        """Has a step carried out; here, if we are closed."""
        self._steps.put(step)
        if self._is_closed:
            self._finish()

    def close(self) -> None:
        """Returns when all that was put is carried out."""
        self._is_closed = True
        self._steps.put(None)
        self._thread.join()
        self._finish()

    def _run(self) -> None:
        while (step := self._steps.get()) is not None:
            try:
                self._carry_out(step)
            except BaseException:  # others follow
                logger.exception("a step of the engine could not be carried out")

    def _finish(self) -> None:
        """Whatever came behind the last one that the thread has seen."""
        while True:
            try:
                step = self._steps.get_nowait()
            except Empty:
                return
            if step is not None:
                self._carry_out(step)
