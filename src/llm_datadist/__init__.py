"""LLM-DataDist on any machine: moves the KV cache of large language models between processes.

The command `llm-datadist docs` lists the pages of the documentation, which are in the package;
`llm-datadist docs 6.10` shows what a docstring here cites as "Spec 6.10".
"""

import os as _os
from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from llm_datadist.cache import Cache
from llm_datadist.cache_task import CacheTask
from llm_datadist.cluster_info import LLMClusterInfo
from llm_datadist.config import LLMConfig, LlmConfig
from llm_datadist.datadist import LLMDataDist
from llm_datadist.errors import LLMException, LLMStatusCode, Status
from llm_datadist.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist.kv_cache import KvCache
from llm_datadist.kv_layout import KVHeads as KVHeads
from llm_datadist.kv_layout import KVLayout as KVLayout
from llm_datadist.layerwise import LayerSynchronizer, TransferConfig, TransferWithCacheKeyConfig
from llm_datadist.types import (
    CacheDesc,
    DataType,
    LLMRole,
    MemInfo,
    Memtype,
    Placement,
    RegisterMemStatus,
)

if _TYPE_CHECKING:
    from llm_datadist.core.reshard import reshard as reshard
    from llm_datadist.following.follower import Follower as Follower
    from llm_datadist.following.wants import Wants as Wants
    from llm_datadist.kv_cache_manager import KvCacheManager
    from llm_datadist.tensor import Tensor, TensorDesc

#: what the package's metadata is made from
__version__ = "0.1.0"

#: as the reference does: programs hand it on to processes that run on its hardware
_os.environ.setdefault("AUTO_USE_UC_MEMORY", "0")

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

#: what needs numpy comes when it is asked for
_LATE = {
    "Follower": "llm_datadist.following.follower",
    "Wants": "llm_datadist.following.wants",
    "KvCacheManager": "llm_datadist.kv_cache_manager",
    "Tensor": "llm_datadist.tensor",
    "TensorDesc": "llm_datadist.tensor",
    "reshard": "llm_datadist.core.reshard",
}


def __getattr__(name: str) -> object:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(_import_module(_LATE[name]), name)
    return value
