"""What travels from the prefill request's answer to the decode request, in `kv_transfer_params`."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import msgspec

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class Lease(msgspec.Struct, frozen=True, array_like=True):
    """A word on the producer's board: as long as it stands there, the blocks are the request's."""

    slot: _Count
    #: never the same twice: a slot that was given to another request is not mistaken
    generation: Annotated[int, msgspec.Meta(ge=1, lt=2**48)]


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's convention for producers that are read from, and the lease."""

    remote_engine_id: str
    remote_request_id: str
    remote_host: str
    remote_port: _Port
    #: by KV cache group, of which there is one
    remote_block_ids: list[list[_Count]]
    remote_num_tokens: _Count
    #: of these tokens, and what else their KV depends on
    remote_digest: str
    remote_lease: Lease
    #: how long the lease lasts without a word
    remote_lease_s: Annotated[float, msgspec.Meta(gt=0)]
    tp_size: int = 1

    @property
    def block_ids(self) -> list[int]:
        """The producer's blocks in the order of the prompt."""
        return self.remote_block_ids[0] if self.remote_block_ids else []

    def to_params(self) -> dict[str, Any]:
        """What the decode request is to carry."""
        params: dict[str, Any] = msgspec.to_builtins(self)
        return {"do_remote_prefill": True, "do_remote_decode": False, **params}


def handover_of(params: dict[str, Any]) -> Handover:
    """Reads what a client sent. Raises ValueError that names the field which is wrong."""
    try:
        return msgspec.convert(params, Handover)
    except msgspec.ValidationError as error:
        raise ValueError(f"kv_transfer_params are not this connector's: {error}") from None


def cluster_id_of(engine_id: str, rank: int) -> int:
    """The cluster id of a worker: engines know each other by name, clusters by number."""
    digest = hashlib.sha256(f"{engine_id}/{rank}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
