"""LLM-DataDist on any machine: moves the KV cache of large language models between processes."""

from llm_datadist.cache import Cache
from llm_datadist.cache_task import CacheTask
from llm_datadist.cluster_info import LLMClusterInfo
from llm_datadist.config import LLMConfig, LlmConfig
from llm_datadist.datadist import LLMDataDist
from llm_datadist.errors import LLMException, LLMStatusCode, Status
from llm_datadist.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist.kv_cache import KvCache
from llm_datadist.kv_cache_manager import KvCacheManager
from llm_datadist.layerwise import LayerSynchronizer, TransferConfig, TransferWithCacheKeyConfig
from llm_datadist.tensor import Tensor, TensorDesc
from llm_datadist.types import (
    CacheDesc,
    DataType,
    LLMRole,
    MemInfo,
    Memtype,
    Placement,
    RegisterMemStatus,
)

#: what programs that import by list expect; the three names of the v1 mode come on top of it
v2_list = [
    "LLMClusterInfo",
    "LLMStatusCode",
    "LLMException",
    "LLMRole",
    "LlmConfig",
    "LLMConfig",
    "DataType",
    "Status",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "KvCache",
    "Cache",
    "BlocksCacheKey",
    "LLMDataDist",
    "Placement",
    "RegisterMemStatus",
    "LayerSynchronizer",
    "TransferConfig",
    "CacheTask",
    "TransferWithCacheKeyConfig",
    "Memtype",
    "MemInfo",
]

__all__ = [  # noqa: RUF022  (the reference's order)
    "LLMClusterInfo",
    "LLMStatusCode",
    "LLMException",
    "LLMRole",
    "LlmConfig",
    "LLMConfig",
    "DataType",
    "Status",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "KvCache",
    "Cache",
    "BlocksCacheKey",
    "LLMDataDist",
    "Placement",
    "RegisterMemStatus",
    "LayerSynchronizer",
    "TransferConfig",
    "CacheTask",
    "TransferWithCacheKeyConfig",
    "Memtype",
    "MemInfo",
    "TensorDesc",
    "Tensor",
    "KvCacheManager",
]
