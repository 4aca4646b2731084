"""The parent as the proxy of a disaggregated service: it routes requests, and measures them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from llm_datadist.cli.demo.messages import (
    Compute,
    Finished,
    Free,
    Generate,
    Generated,
    HandOver,
    Link,
    Linked,
    Loading,
    Pulled,
    Ready,
    Token,
)
from llm_datadist.cli.demo.request import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.cli.demo.messages import ToParent
    from llm_datadist.cli.demo.process import Workers
    from llm_datadist.cli.demo.prompts import Prompt
    from llm_datadist.cli.demo.terminal import Terminal


def load(workers: Workers, terminal: Terminal) -> int:
    """Wait until both have their model. Returns the port that prefill listens on."""
    ports: dict[str, int] = {}
    with terminal.loading_bars() as bars:
        while len(ports) < 2:
            message = workers.receive()
            if isinstance(message, Loading):
                bars.show(message.role, message.fraction, message.doing)
            elif isinstance(message, Ready):
                ports[message.role] = message.port
                bars.show(message.role, 1.0, "ready")
    return ports["prefill"]


def link(workers: Workers, port: int) -> Linked:
    """Have decode link to prefill."""
    workers.decode.send(Link(port))
    message = workers.receive()
    assert isinstance(message, Linked)
    return message


class Proxy:
    """Requests in flight.

    A prompt is submitted as soon as prefill has handed over the one before: prefill computes the
    next prompt while decode still streams the last answers.
    """

    def __init__(self, workers: Workers, terminal: Terminal, prompts: Sequence[Prompt]) -> None:
        self._workers = workers
        self._terminal = terminal
        self._prompts = prompts
        self.requests: list[Request] = []

    def answer_all(self) -> list[Request]:
        """Stream all answers to the terminal."""
        self._submit_next()
        while len(self.requests) < len(self._prompts) or not self._all_finished():
            self._route(self._workers.receive())
        return self.requests

    def _all_finished(self) -> bool:
        return all(request.is_finished for request in self.requests)

    def _submit_next(self) -> None:
        number = len(self.requests)
        if number < len(self._prompts):
            prompt = self._prompts[number]
            self.requests.append(Request(number, prompt, submitted_s=time.monotonic()))
            self._workers.prefill.send(Compute(number, prompt))

    def _route(self, message: ToParent) -> None:
        if isinstance(message, HandOver):
            self._workers.decode.send(message)
            self.requests[message.request_id].note_hand_over(message)
            self._submit_next()
        elif isinstance(message, Pulled):
            self._workers.prefill.send(Free(message.request_id))
            self.requests[message.request_id].note_pulled(message)
        elif isinstance(message, Token):
            request = self.requests[message.request_id]
            request.note_token(message.token, message.text, time.monotonic())
        elif isinstance(message, Finished):
            self.requests[message.request_id].finished_s = time.monotonic()
        self._terminal.show_answers(self.requests)


def generate_plainly(workers: Workers, terminal: Terminal, requests: Sequence[Request]) -> None:
    """Let one process answer every prompt all by itself, for comparison."""
    for request in terminal.proving_bar(requests):
        workers.prefill.send(Generate(request.request_id))
        message = workers.receive()
        assert isinstance(message, Generated)
        request.plain_tokens = list(message.tokens)
