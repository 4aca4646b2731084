"""An object in a process of its own, driven from a test.

    with ObjectProcess(Connector, "prefill", cluster_id=1) as prefill:
        prefill.call(Connector.save, [3, 7])

Functions and classes travel by name: the other process imports the module that defines them.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import traceback
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from typing_extensions import Self

Held = TypeVar("Held")
T = TypeVar("T")

_CALL_S = 60.0


class ObjectProcess(Generic[Held]):
    """A process with the object that `make(*args, **kwargs)` returns there.

    A context manager; leaving it ends the process, whatever its state. The constructor does not
    wait for the object, so that several processes start side by side: `ready`, or the first call,
    does. For one thread at a time.
    """

    def __init__(self, make: Callable[..., Held], *args: object, **kwargs: object) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, make, args, kwargs), daemon=True
        )
        self._process.start()
        theirs.close()
        self._is_ready = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process.pid is not None
        return self._process.pid

    def ready(self, timeout_s: float = _CALL_S) -> Self:
        """Waits until the object is made. Raises what making it raised, TimeoutError, EOFError."""
        if not self._is_ready:
            self._receive(timeout_s)
            self._is_ready = True
        return self

    def call(self, function: Callable[..., T], *args: object, **kwargs: object) -> T:
        """Runs `function(object, *args)` there; its result, or the exception it raised."""
        self.begin(function, *args, **kwargs)
        result: T = self.result()  # type: ignore[assignment]  # what the function returned
        return result

    def begin(self, function: Callable[..., object], *args: object, **kwargs: object) -> None:
        """Starts a call whose outcome `result` waits for. Raises EOFError as that does."""
        try:
            self._pipe.send((function, args, kwargs))
        except BrokenPipeError:
            raise self._ended() from None

    def result(self, timeout_s: float = _CALL_S) -> object:
        """What the call that was begun returned.

        Raises what it raised; TimeoutError when it takes longer, EOFError when the process ended.
        """
        self.ready(timeout_s)
        return self._receive(timeout_s)

    def pause(self) -> None:
        """SIGSTOP, waited for: the process stands still, its connections stay open."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def resume(self) -> None:
        """SIGCONT: the process goes on after `pause`."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, waited for. May be called again."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _receive(self, timeout_s: float) -> object:
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"process {self.pid} did not answer within {timeout_s} s")
        try:
            result, error, trace = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self._ended() from None
        if error is not None:
            error.add_note(trace) if hasattr(error, "add_note") else None
            raise error
        return result

    def _ended(self) -> EOFError:
        self._process.join()
        return EOFError(
            f"process {self.pid} ended with exit code {self._process.exitcode} before it answered; "
            "what it printed last says more"
        )


def _serve(
    pipe: Connection,
    make: Callable[..., object],
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> None:
    try:
        held = make(*args, **kwargs)
        pipe.send((None, None, ""))
    except BaseException as error:  # the test gets it
        pipe.send((None, error, traceback.format_exc()))
        return
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((function(held, *args, **kwargs), None, ""))
        except BaseException as error:  # the test gets it
            pipe.send((None, error, traceback.format_exc()))
