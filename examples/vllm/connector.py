"""The two connectors that the example can run."""

from __future__ import annotations

import re
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

#: what a consumer does when it cannot load a prompt's blocks: vLLM's `kv_load_failure_policy`
POLICIES = ("fail", "recompute")

_LINKED = re.compile(r"is linked to cluster \d+ by (\w+)")


class Connector(str, Enum):
    """Who moves the KV cache."""

    LLM_DATADIST = "llm-datadist"
    NIXL = "nixl"

    @property
    def vllm_name(self) -> str:
        """vLLM's name of it."""
        return "NixlConnector" if self is Connector.NIXL else "LLMDataDistConnector"

    def transfer_config(
        self, kv_role: str, policy: str, kv_port: int, extra: Mapping[str, object]
    ) -> dict[str, object]:
        """vLLM's `--kv-transfer-config`, with the connector's own settings."""
        config: dict[str, object] = {
            "kv_connector": self.vllm_name,
            "kv_role": kv_role,
            "kv_load_failure_policy": policy,
        }
        if extra:
            config["kv_connector_extra_config"] = dict(extra)
        if self is Connector.LLM_DATADIST:
            config |= {
                "kv_connector_module_path": "llm_datadist.integrations.vllm",
                "kv_port": kv_port,
            }
        return config

    def environment(self, kv_port: int) -> dict[str, str]:
        """What goes to a server by environment variable."""
        if self is Connector.NIXL:
            return {
                "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(kv_port),
            }
        return {"ASCEND_GLOBAL_LOG_LEVEL": "1"}  # its log then says which path a link uses

    def path_used(self, decode_log: Path) -> str:
        """How the blocks travelled, by decode's log."""
        if self is Connector.NIXL:
            return "UCX"
        paths = set(_LINKED.findall(decode_log.read_text(encoding="utf-8", errors="replace")))
        return ", ".join(sorted(paths)) or "unknown"
