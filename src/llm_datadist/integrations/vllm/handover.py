"""What the decode request carries in `kv_transfer_params`: of the prefill request's answer, or
before there is one.

On its way an answer passes through hands that may have changed it, or made it up. So it carries a
*proof* over what it says, made with a key that the lease has on its producer's board and that never
travels: only who is linked can check it, and only the producer could make it.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated, Any

import msgspec

from llm_datadist.endpoint import Endpoint

_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
_Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
_Text = Annotated[str, msgspec.Meta(max_length=1024)]

_MOST_WORKERS = 4096
_Workers = Annotated[int, msgspec.Meta(ge=1, le=_MOST_WORKERS)]
_Incarnation = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
#: fields of a hand-over that an announced producer leaves out
_ADDRESS = ("remote_host", "remote_port", "remote_hosts")
#: of the key of a lease
KEY_NBYTES = 16


class Lease(msgspec.Struct, frozen=True, array_like=True):
    """A word on the producer's board: as long as it stands there, the blocks are the request's."""

    slot: _Count
    #: random: nobody knows it who was not told, and who knew the slot's last one learns nothing
    generation: Annotated[int, msgspec.Meta(ge=1, lt=2**48)]


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Who computes a prompt that is read: by vLLM's convention for producers.

    It says where the producer's workers are, or which starts they are: then a directory has the
    rest.
    """

    remote_engine_id: _Text
    #: where the first worker is dialled
    remote_host: _Text = ""
    remote_port: _Port = 0
    #: how long a lease lasts without a word
    remote_lease_s: Annotated[float, msgspec.Meta(gt=0, le=1e9)]
    tp_size: _Workers = 1
    pp_size: _Workers = 1
    #: where each worker is dialled, by its number, unless all are where the first is
    remote_hosts: Annotated[list[_Text], msgspec.Meta(max_length=_MOST_WORKERS)] = []
    #: in place of all addresses: which start each worker is, by its number
    remote_incarnations: Annotated[list[_Incarnation], msgspec.Meta(max_length=_MOST_WORKERS)] = []
    #: of these tokens, and what else their KV depends on
    remote_num_tokens: _Count = 0
    remote_digest: _Text = ""

    @property
    def is_announced(self) -> bool:
        """Whether its producer is found in a directory."""
        return bool(self.remote_incarnations)

    @property
    def producer(self) -> str:
        """Who it is, for people."""
        if self.is_announced:
            return f"{self.remote_engine_id} (start {self.remote_incarnations[0][:8]})"
        return f"{self.remote_engine_id} at {self.remote_host}:{self.remote_port}"

    @property
    def engine_key(self) -> tuple[object, ...]:
        """What is equal of two that mean the same engine, whatever else they say."""
        where = (self.remote_host, *self.remote_hosts, self.remote_port)
        return (*where, *self.remote_incarnations, self.remote_engine_id)

    def address(self, worker: int) -> Endpoint:
        """Where that worker is dialled. Raises LookupError if the engine has no such worker."""
        host = self.remote_hosts[worker] if self.remote_hosts else self.remote_host
        return Endpoint(host, self.remote_port + worker)

    def cluster_id(self, worker: int) -> int:
        """As who that worker is linked. Raises LookupError as `address`."""
        if self.is_announced:
            return cluster_id_of(self.remote_engine_id, self.remote_incarnations[worker], worker)
        return cluster_id_of(self.remote_engine_id, *self.address(worker))


class Handover(Source, frozen=True, kw_only=True):
    """What the answer of a prompt says that was computed: its blocks, and the lease."""

    remote_request_id: _Text
    remote_num_tokens: _Count
    remote_digest: _Text
    #: by KV cache group: what who goes on needs, in the order of the prompt (`Group.needed`)
    remote_block_ids: list[list[_Count]]
    remote_lease: Lease
    #: `proof_of` this, by the lease's key
    remote_proof: _Text = ""

    def to_params(self) -> dict[str, Any]:
        """What the decode request is to carry."""
        params: dict[str, Any] = msgspec.to_builtins(self)
        for name in _ADDRESS if self.is_announced else ("remote_incarnations",):
            del params[name]
        return {"do_remote_prefill": True, "do_remote_decode": False, **params}

    def proved(self, key: bytes) -> Handover:
        """The same with its proof."""
        return msgspec.structs.replace(self, remote_proof=self._proof(key))

    def is_proved(self, key: bytes) -> bool:
        """Whether it says what was said by the producer that gave the lease this key."""
        return hmac.compare_digest(self.remote_proof.encode(), self._proof(key).encode())

    def _proof(self, key: bytes) -> str:
        said = msgspec.msgpack.encode(msgspec.structs.replace(self, remote_proof=""))
        return hashlib.blake2b(said, key=key, digest_size=16).hexdigest()


class Named(Source, frozen=True, kw_only=True):
    """What the requests to both engines say of a prompt that is yet to be computed.

    Blocks and lease are found by the name at the producer, when it begins.
    """

    transfer_id: _Text

    @property
    def key(self) -> tuple[object, ...]:
        """What is equal of two that mean the same prompt of the same engine."""
        return *self.engine_key, self.transfer_id

    def expecting(self, num_tokens: int, digest: str) -> Named:
        """The same of the prompt as it was read here."""
        return msgspec.structs.replace(self, remote_num_tokens=num_tokens, remote_digest=digest)

    def found(self, lease: Lease) -> Handover:
        """The same where the producer has begun. It names no blocks."""
        who = {name: getattr(self, name) for name in Source.__struct_fields__}
        return Handover(
            **who, remote_request_id=self.transfer_id, remote_block_ids=[], remote_lease=lease
        )


def source_of(params: dict[str, Any]) -> Handover | Named:
    """Reads what a client sent. Raises ValueError that names the field which is wrong."""
    is_named = "transfer_id" in params and "remote_lease" not in params
    kind: type[Handover | Named] = Named if is_named else Handover
    try:
        source = msgspec.convert(params, kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"kv_transfer_params are not this connector's: {error}") from None
    for name in source.__struct_fields__:
        value = getattr(source, name)
        texts = value if name == "remote_hosts" else [value]
        if not all(text.isprintable() for text in texts if isinstance(text, str)):  # it is logged
            raise ValueError(f"kv_transfer_params are not this connector's: {name} is no text")
    has_address = {bool(source.remote_host), bool(source.remote_port)}
    if has_address != {not source.is_announced}:
        raise ValueError(
            "kv_transfer_params are not this connector's: they have an address, or incarnations"
        )
    return source


def cluster_id_of(engine_id: str, where: str, number: int) -> int:
    """The cluster id of a producer's worker: engines are known by name, clusters by number.

    Its address belongs to the name, host and port: launch scripts give every engine the same one.
    In a directory that is its incarnation and the worker's number, so that two starts of an engine
    are two clusters, which nothing takes for each other.
    """
    name = repr((engine_id, where, number)).encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:7], "big")
