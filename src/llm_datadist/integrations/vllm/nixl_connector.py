"""LLMDataDistConnector under the name NixlConnector, for programs that know connectors by name.

Proxies, routers and orchestrators decide by that name which parameters a connector speaks. They are
the same ones, so they need not know that the blocks go another way. It is no NIXL: both ends must
have this class, or LLMDataDistConnector.

--kv-transfer-config '{"kv_connector": "NixlConnector",
                       "kv_connector_module_path": "llm_datadist.integrations.vllm.nixl_connector",
                       "kv_role": "kv_both"}'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm import envs

from llm_datadist.integrations.vllm.connector import LLMDataDistConnector
from llm_datadist.integrations.vllm.nixl_words import in_nixls_words, settings_by_nixls_words

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig
    from vllm.v1.request import Request

    from llm_datadist.integrations.vllm.settings import Settings


class NixlConnector(LLMDataDistConnector):
    """As its base, by the settings and with the fields of vLLM's connector of that name."""

    @classmethod
    def _read_settings(cls, config: KVTransferConfig, first_rank: int) -> Settings:
        host, port = envs.VLLM_NIXL_SIDE_CHANNEL_HOST, envs.VLLM_NIXL_SIDE_CHANNEL_PORT
        return settings_by_nixls_words(config, host, port, first_rank)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        is_kept, params = super().request_finished_all_groups(request, block_ids)
        return is_kept, params and in_nixls_words(params)
