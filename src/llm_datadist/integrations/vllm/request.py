"""What the connector reads of vLLM's requests."""

from __future__ import annotations

from typing import Any, Protocol


class _Status(Protocol):
    @property
    def name(self) -> str: ...


class Request(Protocol):
    """The part of `vllm.v1.request.Request` that is used here."""

    request_id: str
    kv_transfer_params: dict[str, Any] | None
    num_computed_tokens: int

    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def status(self) -> _Status: ...


def wants_remote_decode(request: Request) -> bool:
    """Whether another engine will go on with this request."""
    return bool((request.kv_transfer_params or {}).get("do_remote_decode"))


def wants_remote_prefill(request: Request) -> bool:
    """Whether another engine has computed the prompt, and its blocks were not asked for yet."""
    return bool((request.kv_transfer_params or {}).get("do_remote_prefill"))


def do_no_remote_prefill(request: Request) -> None:
    """From now on the request is one like any other."""
    if request.kv_transfer_params is not None:
        request.kv_transfer_params["do_remote_prefill"] = False
