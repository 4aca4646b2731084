"""What NixlConnector is told and says, in its words: see nixl_connector.py."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any, Final

from llm_datadist.integrations.vllm.settings import Extra, Settings, settings_of

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig

logger = logging.getLogger(__name__)

#: of each hand-over, beside what the convention has: what a router may look at
_SAID: Final = {"dcp_size": 1, "transfer_mode": "pull", "remote_blocks_expiry_time": None}


def settings_by_nixls_words(
    config: KVTransferConfig, host: str, port: int, first_rank: int
) -> Settings:
    """As `settings_of`, with the address of NixlConnector's side channel.

    Entries of `kv_connector_extra_config` that only NIXL has a use for are left out, and the log
    says so. Raises ValueError as `settings_of`, for entries that are wrong.
    """
    extra = dict(config.kv_connector_extra_config)
    unused = sorted(set(extra) - set(Extra.__struct_fields__))
    if unused:
        logger.info("not used by this NixlConnector, which is no NIXL: %s", ", ".join(unused))
    ours = copy.copy(config)
    ours.kv_connector_extra_config = {
        "host": host, **{name: value for name, value in extra.items() if name not in unused},
    }  # fmt: skip
    ours.kv_port = port
    return settings_of(ours, first_rank)


def in_nixls_words(params: dict[str, Any]) -> dict[str, Any]:
    """A hand-over with the fields that NixlConnector's has beside ours."""
    return {**_SAID, **params}
