"""Requests to the servers, and their counters. Answers are compared by token."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
from proxy import prefill_request
from servers import MODEL_NAME

from llm_datadist.cli.failure import CommandError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from servers import Process

#: beyond all timeouts of the connectors, so that what is seen is their behaviour
_TIMEOUT_S = 240.0
_LOADED = "vllm:prompt_tokens_by_source_total{"
_PULLED = "vllm:llm_datadist_pull_bytes_sum{"
_FROM_PREFILL, _COMPUTED = 'source="external_kv_transfer"', 'source="local_compute"'


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said: tokens, or why there are none or no more."""

    tokens: tuple[int, ...]
    error: str | None = None


def greedy(prompt: Sequence[int], num_tokens: int, **more: object) -> dict[str, Any]:
    """A request for the `num_tokens` likeliest tokens after `prompt`."""
    return {
        "model": MODEL_NAME,
        "prompt": list(prompt),
        "temperature": 0,
        "max_tokens": num_tokens,
        "min_tokens": num_tokens,
        "return_token_ids": True,
        **more,
    }


def ask(server: Process, request: dict[str, Any]) -> Answer:
    """Send `request` and wait for the whole answer; whatever goes wrong is in the answer."""
    try:
        response = httpx.post(server.completions_url, json=request, timeout=_TIMEOUT_S)
    except httpx.HTTPError as error:
        return Answer((), repr(error))
    if not response.is_success:
        return Answer((), f"HTTP {response.status_code}: {response.text[:200]}")
    choice = response.json()["choices"][0]
    failed = choice["finish_reason"] not in ("length", "stop")
    return Answer(
        tuple(choice["token_ids"] or ()), str(choice["finish_reason"]) if failed else None
    )


def right_tokens(plain: Process, request: dict[str, Any]) -> tuple[int, ...]:
    """What one server by itself answers. Raises CommandError when it fails."""
    answer = ask(plain, request)
    if answer.error is not None:
        raise CommandError(f"the plain server answers {answer.error}: see {plain.log}")
    return answer.tokens


def prefill(server: Process, request: dict[str, Any]) -> dict[str, Any]:
    """Let `server` compute the prompt; the request for decode. Raises httpx.HTTPError."""
    response = httpx.post(
        server.completions_url, json=prefill_request(request), timeout=_TIMEOUT_S
    ).raise_for_status()
    return request | {"kv_transfer_params": response.json()["kv_transfer_params"]}


def first_token_s(server: Process, request: dict[str, Any]) -> float:
    """The time from sending `request` to the first token. Raises httpx.HTTPError."""
    with httpx.Client(timeout=_TIMEOUT_S) as client:
        # Connecting is not what is measured.
        client.get(f"{server.base_url}/health").raise_for_status()
        start_s = time.perf_counter()
        with client.stream(
            "POST", server.completions_url, json=request | {"stream": True}
        ) as response:
            response.raise_for_status()
            first_s = None
            # To the end: an answer that nobody reads is an abort, which the next would meet.
            for event in _events(response):
                if first_s is None and any(
                    choice.get("token_ids") for choice in event.get("choices", ())
                ):
                    first_s = time.perf_counter()
    if first_s is None:
        raise httpx.RemoteProtocolError("the answer ended before its first token")
    return first_s - start_s


def num_loaded_tokens(decode: Process) -> int:
    """How many prompt tokens `decode` has not computed but had from a prefill server."""
    return _counted(decode, _LOADED, _FROM_PREFILL)


def num_computed_tokens(server: Process) -> int:
    """How many prompt tokens `server` has computed."""
    return _counted(server, _LOADED, _COMPUTED)


def num_running_requests(server: Process) -> int:
    """How many requests `server` computes just now."""
    return _counted(server, "vllm:num_requests_running{", "")


def num_pulled_bytes(decode: Process) -> int:
    """How many bytes `decode` has read by llm-datadist."""
    return _counted(decode, _PULLED, "")


def _counted(server: Process, name: str, label: str) -> int:
    response = httpx.get(f"{server.base_url}/metrics", timeout=_TIMEOUT_S).raise_for_status()
    return sum(
        int(float(line.rpartition(" ")[2]))
        for line in response.text.splitlines()
        if line.startswith(name) and label in line
    )


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        data = line.removeprefix("data: ")
        if data != line and data != "[DONE]":
            yield json.loads(data)
