"""The parent's side of the two worker processes. Every wait is bounded."""

from __future__ import annotations

import multiprocessing
import signal
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

from llm_datadist.cli.demo.failure import DemoError, SetupError
from llm_datadist.cli.demo.messages import Failed
from llm_datadist.cli.demo.worker import run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from llm_datadist.cli.demo.messages import Role, ToParent, ToWorker
    from llm_datadist.cli.demo.settings import Settings

#: No step of a worker takes nearly as long on a slow machine.
_SILENCE_S = 300.0
#: how long a worker may take to end by itself, and again after it was told to
_ENDING_S = 15.0


class WorkerProcess:
    """One worker, started. It stops when its connection closes."""

    def __init__(self, role: Role, settings: Settings) -> None:
        # A fresh interpreter: torch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        inner: Connection[ToParent, ToWorker]
        self.connection: Connection[ToWorker, ToParent]
        self.connection, inner = context.Pipe()
        self.role = role
        self._process = context.Process(target=run, args=(role, inner, settings), daemon=True)
        self._process.start()
        inner.close()

    def send(self, message: ToWorker) -> None:
        """Send `message`. A worker that died by now is noticed when its answer is awaited."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)

    def receive(self) -> ToParent:
        """The next message, which has to be there. Raises DemoError when the worker has ended."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(_ENDING_S)
            raise DemoError(
                f"the {self.role} process has ended unexpectedly ({self._ending()})."
            ) from None

    def stop(self, *, in_peace: bool) -> None:
        """End the process; `in_peace` lets it close its link first."""
        self.connection.close()
        if in_peace:
            self._process.join(_ENDING_S)
        for end in (self._process.terminate, self._process.kill):
            if self._process.is_alive():
                end()
                self._process.join(_ENDING_S)

    def _ending(self) -> str:
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}; SIGKILL often means out of memory"
        return f"exit code {code}"


class Workers:
    """Prefill and decode."""

    def __init__(self, prefill: WorkerProcess, decode: WorkerProcess) -> None:
        self.prefill = prefill
        self.decode = decode

    @classmethod
    @contextmanager
    def start(cls, settings: Settings) -> Iterator[Workers]:
        """Both workers, until the end of the `with`."""
        with _interrupts_kept_for_later():
            workers = cls(WorkerProcess("prefill", settings), WorkerProcess("decode", settings))
        try:
            yield workers
        except BaseException:
            workers.stop(in_peace=False)
            raise
        workers.stop(in_peace=True)

    def stop(self, *, in_peace: bool) -> None:
        """End both processes."""
        # decode first: it tells prefill that the link ends
        self.decode.stop(in_peace=in_peace)
        self.prefill.stop(in_peace=in_peace)

    def receive(self) -> ToParent:
        """The next message of either.

        Raises DemoError (SetupError if the user can put it right) when a worker fails, dies, or
        says nothing for minutes.
        """
        ready = wait([self.prefill.connection, self.decode.connection], timeout=_SILENCE_S)
        if not ready:
            raise DemoError(f"neither worker has said anything for {_SILENCE_S:.0f} s.")
        worker = self.prefill if self.prefill.connection in ready else self.decode
        message = worker.receive()
        if isinstance(message, Failed):
            kind = SetupError if message.exit_code == SetupError.exit_code else DemoError
            raise kind("\n".join(filter(None, (message.message, message.details))))
        return message


@contextmanager
def _interrupts_kept_for_later() -> Iterator[None]:
    """Start workers that Ctrl-C does not reach: the parent, which it does reach, ends them.

    A blocked signal stays blocked in the processes that are started meanwhile, from their first
    moment on. Here it waits until the end of the `with`, also one that another thread has taken,
    such as the one that draws: a worker that is started by half would die of it.
    """
    # Its own start would unblock the signal.
    resource_tracker.ensure_running()
    interrupts: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
        for number in interrupts[:1]:
            signal.raise_signal(number)
