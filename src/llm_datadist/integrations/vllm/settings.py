"""What `--kv-transfer-config` says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from llm_datadist import LLMConfig
from llm_datadist.directory.record import MAX_TTL_S, MIN_TTL_S

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig

_Hosts = str | list[str]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
_Ttl = Annotated[float, msgspec.Meta(ge=MIN_TTL_S, le=MAX_TTL_S)]


class Extra(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`kv_connector_extra_config`: what may stand there, and what holds without."""

    #: where a producer listens: an IP address or a name; 0.0.0.0 and :: are all addresses. One for
    #: all workers, or one for each by its rank
    host: _Hosts = "127.0.0.1"
    #: what its readers are told to dial; without it `host`, or an address of the machine
    advertised_host: _Hosts | None = None
    #: how long a producer keeps blocks without a word from their reader
    kv_lease_duration: _Seconds = 30.0
    pull_timeout_s: _Seconds = 10.0
    link_timeout_s: _Seconds = 10.0
    #: how many requests of a producer may be under way or waiting to be read
    max_leases: Annotated[int, msgspec.Meta(gt=0)] = 16_384
    #: whether prompts are handed over while they are computed, where both requests ask for it
    overlap: bool = False
    #: how long a reader of such a prompt waits without news of it
    overlap_timeout_s: _Seconds = 60.0
    #: where the engine announces itself and finds others, as `LLMDataDist.follow` takes it. Then
    #: hand-overs name starts of engines, and no addresses
    directory: str | None = None
    #: what is said there of the engine, for others than its peers: where a proxy asks it, ...
    labels: dict[str, str] = {}
    #: who is not heard of there for so long is taken for gone
    directory_ttl_s: _Ttl = 15.0
    #: options of LLMConfig by name: transfer_path, link_security, verify_transfers, ...
    llm_config: dict[str, Any] = {}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one engine. Worker `rank` listens at `port + rank`."""

    engine_id: str
    role: str
    port: int
    extra: Extra = Extra()

    @property
    def is_producer(self) -> bool:
        """Whether others may read from here."""
        return self.role in ("kv_producer", "kv_both")

    @property
    def is_consumer(self) -> bool:
        """Whether others are read from here."""
        return self.role in ("kv_consumer", "kv_both")


def settings_of(kv_transfer_config: KVTransferConfig, first_rank: int = 0) -> Settings:
    """Reads vLLM's configuration. Raises ValueError that names the entry which is wrong."""
    try:
        extra = msgspec.convert(kv_transfer_config.kv_connector_extra_config, Extra)
    except msgspec.ValidationError as error:
        raise ValueError(f"kv_connector_extra_config: {error}") from None
    known = {name for name in vars(LLMConfig) if not name.startswith("_")}
    if unknown := sorted(set(extra.llm_config) - known):
        raise ValueError(f"kv_connector_extra_config: LLMConfig has no {', '.join(unknown)}")
    if extra.labels and extra.directory is None:
        raise ValueError("kv_connector_extra_config: labels are said in a directory; none is set")
    return Settings(
        engine_id=kv_transfer_config.engine_id,
        role=kv_transfer_config.kv_role,
        port=kv_transfer_config.kv_port + first_rank,
        extra=extra,
    )
