"""The KV connector for vLLM, loaded by `kv_connector_module_path`: see the guide With vLLM.

--kv-transfer-config '{"kv_connector": "LLMDataDistConnector",
                       "kv_connector_module_path": "llm_datadist.integrations.vllm",
                       "kv_role": "kv_producer"}'
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_datadist.integrations.vllm.connector import LLMDataDistConnector

__all__ = ["LLMDataDistConnector"]


def __getattr__(name: str) -> object:
    """Imports vLLM with the connector only: the parts beside it do without."""
    if name in __all__:
        from llm_datadist.integrations.vllm.connector import LLMDataDistConnector

        return LLMDataDistConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
