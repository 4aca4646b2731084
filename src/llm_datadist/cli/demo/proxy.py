"""The parent as the proxy of a disaggregated service: it routes requests, and measures them."""

from __future__ import annotations

import signal
import time
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llm_datadist.cli.demo.request import (
    Generated,
    HandOver,
    Linked,
    Listening,
    Loading,
    Pulled,
    Request,
    Token,
)
from llm_datadist.cli.demo.workers import Decode, Prefill, Worker
from llm_datadist.cli.failure import CommandError
from llm_datadist.testing.process import ObjectProcess, wait_any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from llm_datadist.cli.demo.request import Event, Prompt
    from llm_datadist.cli.demo.screens import Terminal
    from llm_datadist.cli.demo.settings import Settings

#: No step of a worker takes nearly as long on a slow machine.
_SILENCE_S = 300.0


class WorkerProcess:
    """One worker, and the calls that it has not finished."""

    def __init__(self, name: str, process: ObjectProcess[Any]) -> None:
        self.name = name
        self.process = process
        self._calls: deque[Iterator[Event]] = deque()

    @property
    def is_busy(self) -> bool:
        """Whether a call is under way."""
        return bool(self._calls)

    def begin(self, method: Callable[..., Iterable[Event]], *args: object) -> None:
        """Call `method` there, after what was begun before."""
        with self._death_explained():
            self._calls.append(self.process.stream(Worker.told, method, *args))

    def receive(self) -> Event | None:
        """What it says next; None when a call has ended. Raises CommandError when it fails."""
        with self._death_explained():
            if not self._calls:
                raise EOFError  # asked for nothing, it has only its end to tell
            event = next(self._calls[0], None)
        if event is None:
            self._calls.popleft()
        return event

    @contextmanager
    def _death_explained(self) -> Iterator[None]:
        try:
            yield
        except EOFError:
            self.process.kill()  # now that is waited for
            raise CommandError(
                f"the {self.name} process has ended unexpectedly ({self._ending()})."
            ) from None

    def _ending(self) -> str:
        code = self.process.exit_code
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
        with ObjectProcess(Prefill, settings) as prefill, ObjectProcess(Decode, settings) as decode:
            workers = cls(WorkerProcess(Prefill.name, prefill), WorkerProcess(Decode.name, decode))
            yield workers
            workers.close()

    def receive(self) -> tuple[WorkerProcess, Event | None]:
        """Who says something next, and what; None when a call has ended.

        Raises CommandError (SetupError if the user can put it right) when a worker fails, dies, or
        says nothing for minutes.
        """
        workers = {worker.process: worker for worker in (self.prefill, self.decode)}
        try:
            first, *_ = wait_any(list(workers), _SILENCE_S)
        except TimeoutError:
            raise CommandError(
                f"neither worker has said anything for {_SILENCE_S:.0f} s."
            ) from None
        worker = workers[first]
        return worker, worker.receive()

    def events(self) -> Iterator[tuple[WorkerProcess, Event]]:
        """What is said until no call is under way."""
        while self.prefill.is_busy or self.decode.is_busy:
            worker, event = self.receive()
            if event is not None:
                yield worker, event

    def ask(
        self, worker: WorkerProcess, method: Callable[..., Iterable[Event]], *args: object
    ) -> Event:
        """The one thing that `method` says, when nothing else is under way."""
        worker.begin(method, *args)
        [(_, event)] = self.events()
        return event

    def close(self) -> None:
        """Have both let go of each other, decode first: it tells prefill that the link ends."""
        for worker, method in ((self.decode, Decode.close), (self.prefill, Prefill.close)):
            worker.begin(method)
            for _ in self.events():
                pass  # of calls that were still under way


def load(workers: Workers, terminal: Terminal) -> int:
    """Wait until both have their model. Returns the port that prefill listens on."""
    port = 0
    with terminal.loading_bars() as bars:
        workers.prefill.begin(Prefill.load)
        workers.decode.begin(Decode.load)
        for worker, event in workers.events():
            if isinstance(event, Listening):
                port = event.port
            elif isinstance(event, Loading):
                bars.show(worker.name, event.fraction, event.doing)
    return port


def link(workers: Workers, port: int) -> Linked:
    """Have decode link to prefill."""
    linked = workers.ask(workers.decode, Decode.link, port)
    assert isinstance(linked, Linked)
    return linked


class Proxy:
    """Requests in flight.

    A prompt is submitted as soon as prefill has handed over the one before: prefill computes the
    next prompt while decode still streams the last answers.
    """

    def __init__(self, workers: Workers, terminal: Terminal, prompts: Sequence[Prompt]) -> None:
        self._workers = workers
        self._terminal = terminal
        self._prompts = prompts
        #: what decode is to fetch before it computes the next token
        self._handed_over: list[HandOver] = []
        self.requests: list[Request] = []

    def answer_all(self) -> list[Request]:
        """Stream all answers to the terminal."""
        self._submit_next()
        while len(self.requests) < len(self._prompts) or not self._all_finished():
            self._keep_decode_going()
            _, event = self._workers.receive()
            if event is not None:
                self._route(event)
        return self.requests

    def _all_finished(self) -> bool:
        return all(request.is_finished for request in self.requests)

    def _submit_next(self) -> None:
        number = len(self.requests)
        if number < len(self._prompts):
            prompt = self._prompts[number]
            self.requests.append(Request(number, prompt, submitted_s=time.monotonic()))
            self._workers.prefill.begin(Prefill.compute, number, prompt)

    def _keep_decode_going(self) -> None:
        has_work = any(request.is_at_decode for request in self.requests)
        if has_work and not self._workers.decode.is_busy:
            self._workers.decode.begin(Decode.go_on, self._handed_over)
            self._handed_over = []

    def _route(self, event: Event) -> None:
        if isinstance(event, HandOver):
            self._handed_over.append(event)
            self.requests[event.request_id].note_hand_over(event)
            self._submit_next()
        elif isinstance(event, Pulled):
            self._workers.prefill.begin(Prefill.release, event.request_id)
            self.requests[event.request_id].note_pulled(event)
        elif isinstance(event, Token):
            self.requests[event.request_id].note_token(event, time.monotonic())
        self._terminal.show_answers(self.requests)


def generate_plainly(workers: Workers, terminal: Terminal, requests: Sequence[Request]) -> None:
    """Let one process answer every prompt all by itself, for comparison."""
    for request in terminal.proving_bar(requests):
        generated = workers.ask(workers.prefill, Prefill.generate, request.request_id)
        assert isinstance(generated, Generated)
        request.plain_tokens = list(generated.tokens)
