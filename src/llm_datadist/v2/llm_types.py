"""Import path of existing programs: all types. Spec 2.2."""

from llm_datadist.cache import Cache
from llm_datadist.cache_task import CacheTask
from llm_datadist.cluster_info import LLMClusterInfo
from llm_datadist.errors import LLMException, LLMStatusCode, Status
from llm_datadist.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist.kv_cache import KvCache
from llm_datadist.layerwise import (
    LayerSynchronizer,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist.types import (
    CacheDesc,
    DataType,
    LLMRole,
    MemInfo,
    Memtype,
    Placement,
    RegisterMemStatus,
)

__all__ = [
    "BlocksCacheKey",
    "Cache",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "CacheTask",
    "DataType",
    "KvCache",
    "LLMClusterInfo",
    "LLMException",
    "LLMRole",
    "LLMStatusCode",
    "LayerSynchronizer",
    "MemInfo",
    "Memtype",
    "Placement",
    "RegisterMemStatus",
    "Status",
    "TransferConfig",
    "TransferWithCacheKeyConfig",
]
