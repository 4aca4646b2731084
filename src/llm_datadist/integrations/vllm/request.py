"""What the connector reads of vLLM's requests."""

from __future__ import annotations

import hashlib
from array import array
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Status(Protocol):
    @property
    def name(self) -> str: ...


class _Lora(Protocol):
    @property
    def lora_name(self) -> str: ...


class _Feature(Protocol):
    @property
    def identifier(self) -> str: ...


class Request(Protocol):
    """The part of `vllm.v1.request.Request` that is used here."""

    request_id: str
    #: a client may have put anything there
    kv_transfer_params: Any
    num_computed_tokens: int
    #: of the answer
    max_tokens: int

    prompt_token_ids: list[int] | None
    #: with what was answered
    _all_token_ids: list[int]
    num_prompt_tokens: int
    #: it wants something said of each token of its prompt
    skip_reading_prefix_cache: bool

    @property
    def lora_request(self) -> _Lora | None: ...
    @property
    def mm_features(self) -> Sequence[_Feature]: ...
    @property
    def status(self) -> _Status: ...


def wants_remote_decode(request: Request) -> bool:
    """Whether another engine will go on with this request."""
    return bool(_params_of(request).get("do_remote_decode"))


def transfer_id_of(request: Request) -> str | None:
    """The name under which another engine waits for this request's prompt, if it does."""
    name = _params_of(request).get("transfer_id")
    return name if isinstance(name, str) else None


def wants_remote_prefill(request: Request) -> bool:
    """Whether another engine has computed the prompt."""
    return bool(_params_of(request).get("do_remote_prefill"))


def leave_last_token(request: Request) -> bool:
    """Has the prompt computed without its last token, which who goes on computes anyway.

    Then what is kept at the end is what that token needs: a state before it, or all of its window.
    The answer to what is left of the prompt is nobody's. False if the request must stay as it is.
    """
    tokens = request.prompt_token_ids
    if tokens is None or len(tokens) < 2 or request.skip_reading_prefix_cache:
        return False
    request.prompt_token_ids = tokens[:-1]  # the list may be the client's, too
    del request._all_token_ids[-1:]
    request.num_prompt_tokens -= 1
    request.max_tokens = 1
    return True


def num_handed_over(request: Request) -> int:
    """How many tokens of an ended request another engine can go on behind.

    Those of the prompt; of one whose prompt was read, and of which more than a token was asked, the
    answer's too, for the next turn of a conversation. Not the last, whose KV nobody has computed.
    """
    if not wants_remote_prefill(request) or request.max_tokens == 1:
        return min(request.num_computed_tokens, request.num_prompt_tokens)
    # what is scheduled ahead is counted as computed
    return min(request.num_computed_tokens, len(request._all_token_ids) - 1)


def digest_of(request: Request, num_tokens: int) -> str:
    """Of the first tokens of prompt and answer, and of what their KV depends on besides the model.

    Two engines may read one text as other tokens: by another chat template, or another tokenizer.
    """
    lora = request.lora_request.lora_name if request.lora_request else ""
    features = [feature.identifier for feature in request.mm_features]
    known = request._all_token_ids if request.prompt_token_ids else []
    tokens = array("q", known[:num_tokens])
    digest = hashlib.blake2b(repr((num_tokens, lora, features)).encode(), digest_size=16)
    digest.update(tokens.tobytes())
    return digest.hexdigest()


def _params_of(request: Request) -> dict[str, Any]:
    params = request.kv_transfer_params
    return params if isinstance(params, dict) else {}
