"""An object in a process of its own, driven from a test.

    with ObjectProcess(Connector, "prefill", cluster_id=1) as prefill:
        prefill.call(Connector.save, [3, 7])
        for token in prefill.stream(Connector.generate, "Why?"):
            ...

Functions and classes travel by name: the other process imports the module that defines them.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
import time
import traceback
from collections import deque
from contextlib import contextmanager
from itertools import count
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection

    from typing_extensions import Self

Held = TypeVar("Held")
T = TypeVar("T")

_CALL_S = 60.0
#: the number of what makes the object; calls count from 1
_MAKING = 0


class _Call(NamedTuple):
    """What the process is to do."""

    number: int
    function: Callable[..., Any]
    args: tuple[object, ...]
    kwargs: dict[str, object]
    is_stream: bool


class _Answer(NamedTuple):
    """What it says to a call: one value of a stream, or the last of it."""

    number: int
    value: object = None
    is_last: bool = True
    error: BaseException | None = None
    trace: str = ""


class ObjectProcess(Generic[Held]):
    """A process with the object that `make(*args, **kwargs)` returns there.

    A context manager; leaving it ends the process, whatever its state. The constructor does not
    wait for the object, so that several processes start side by side: `ready`, or the first call,
    does. Ctrl-C does not reach the process: it ends the test, which ends the process.

    The process does one call at a time, in the order in which they were begun; outcomes are to be
    taken in that order. For one thread at a time.
    """

    def __init__(self, make: Callable[..., Held], *args: object, **kwargs: object) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, make, args, kwargs), daemon=True
        )
        with _interrupts_kept_for_later():
            self._process.start()
        theirs.close()
        self._is_ready = False
        self._numbers = count(_MAKING + 1)
        #: the calls whose outcome is yet to be taken
        self._begun: deque[int] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """How the process ended, minus the signal that killed it; None while it runs."""
        return self._process.exitcode

    def ready(self, timeout_s: float = _CALL_S) -> Self:
        """Waits until the object is made. Raises what making it raised, TimeoutError, EOFError."""
        if not self._is_ready:
            _raise_error_of(self._receive(_MAKING, timeout_s))
            self._is_ready = True
        return self

    def call(self, function: Callable[..., T], *args: object, **kwargs: object) -> T:
        """Runs `function(object, *args)` there; its result, or the exception it raised."""
        self.begin(function, *args, **kwargs)
        result: T = self.result()  # type: ignore[assignment]  # what the function returned
        return result

    def stream(
        self, function: Callable[..., Iterator[T]], *args: object, **kwargs: object
    ) -> Iterator[T]:
        """Begins `function(object, *args)`, a generator: its values, each as soon as it is there.

        Raises as `result` does, in between. What is left of a stream that was left early is dropped
        when the outcome of a later call is taken.
        """
        return self._values_of(self._send(function, args, kwargs, is_stream=True))

    def begin(self, function: Callable[..., object], *args: object, **kwargs: object) -> None:
        """Starts a call whose outcome `result` waits for. Raises EOFError as that does."""
        self._begun.append(self._send(function, args, kwargs, is_stream=False))

    def result(self, timeout_s: float = _CALL_S) -> object:
        """What the call that was begun returned.

        Raises what it raised; TimeoutError when it takes longer, EOFError when the process ended.
        """
        assert self._begun, "call begin first"
        self.ready(timeout_s)
        answer = self._receive(self._begun[0], timeout_s)
        self._begun.popleft()
        _raise_error_of(answer)
        return answer.value

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

    def _send(
        self,
        function: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
        *,
        is_stream: bool,
    ) -> int:
        number = next(self._numbers)
        try:
            self._pipe.send(_Call(number, function, args, kwargs, is_stream))
        except (BrokenPipeError, ConnectionResetError):
            raise self._ended() from None
        return number

    def _values_of(self, number: int) -> Iterator[Any]:
        self.ready()
        while not (answer := self._receive(number, _CALL_S)).is_last:
            yield answer.value
        _raise_error_of(answer)

    def _receive(self, number: int, timeout_s: float) -> _Answer:
        """The next answer to that call; what is left of earlier ones is dropped."""
        deadline = time.monotonic() + timeout_s
        while self._pipe.poll(max(0.0, deadline - time.monotonic())):
            try:
                answer: _Answer = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                raise self._ended() from None
            if answer.number == number:
                return answer
            if time.monotonic() > deadline:  # what is left has no end
                break
        raise TimeoutError(f"process {self.pid} did not answer within {timeout_s} s")

    def _ended(self) -> EOFError:
        self._process.join()
        return EOFError(
            f"process {self.pid} ended with exit code {self.exit_code} before it answered; "
            "what it printed last says more"
        )


def wait_any(
    processes: Sequence[ObjectProcess[Any]], timeout_s: float = _CALL_S
) -> list[ObjectProcess[Any]]:
    """Waits until one of them has something to say: an outcome, a stream's value, or that it ended.

    Those that have, in the order of `processes`: `result`, or the next value, is there. (The first
    that a process says is that it is `ready`.) Raises TimeoutError when none has.
    """
    pipes = [process._pipe for process in processes]
    heard = wait(pipes, timeout_s)
    if not heard:
        pids = ", ".join(str(process.pid) for process in processes)
        raise TimeoutError(f"none of the processes {pids} answered within {timeout_s} s")
    return [process for process, pipe in zip(processes, pipes, strict=True) if pipe in heard]


def _raise_error_of(answer: _Answer) -> None:
    if answer.error is not None:
        if hasattr(answer.error, "add_note"):
            answer.error.add_note(answer.trace)
        raise answer.error


@contextmanager
def _interrupts_kept_for_later() -> Iterator[None]:
    """Start a process that Ctrl-C does not reach.

    A blocked signal stays blocked in a process that is started meanwhile, from its first moment on.
    Here it waits until the end of the `with`, also one that another thread has taken: a process
    that is started by half would die of it.
    """
    # Its own start would unblock the signal.
    resource_tracker.ensure_running()
    interrupts: list[int] = []
    # Python interrupts its main thread alone, and lets no other one set a handler.
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        handler = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if is_main:
            signal.signal(signal.SIGINT, handler)
        for number in interrupts[:1]:
            signal.raise_signal(number)


# -- in the other process --


def _serve(
    pipe: Connection,
    make: Callable[..., object],
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> None:
    try:
        try:
            held = make(*args, **kwargs)
            pipe.send(_Answer(_MAKING))
        except BaseException as error:  # the test gets it
            pipe.send(_failure(_MAKING, error))
            return
        while True:
            call: _Call = pipe.recv()
            try:
                _answer(pipe, held, call)
            except BaseException as error:  # the test gets it
                pipe.send(_failure(call.number, error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # nobody listens any more


def _answer(pipe: Connection, held: object, call: _Call) -> None:
    value = call.function(held, *call.args, **call.kwargs)
    if call.is_stream:
        for each in value:
            pipe.send(_Answer(call.number, each, is_last=False))
        value = None
    pipe.send(_Answer(call.number, value))


def _failure(number: int, error: BaseException) -> _Answer:
    return _Answer(number, error=error, trace=traceback.format_exc())
