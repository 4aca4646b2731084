"""The keys of the option dict. Spec 4.2, 7.1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from llm_datadist.errors import invalid
from llm_datadist.near_names import nearest, warn_of_unknown

if TYPE_CHECKING:
    from collections.abc import Iterable

DEVICE_ID: Final = "ge.exec.deviceId"
SESSION_DEVICE_ID: Final = "ge.session_device_id"
#: what C++ calls DEVICE_ID
CPP_DEVICE_ID: Final = "llm.DeviceId"
LISTEN_IP_INFO: Final = "llm.listenIpInfo"
#: what C++ calls LISTEN_IP_INFO
CPP_LISTEN_IP_INFO: Final = "llm.ListenIpInfo"
SYNC_KV_TIMEOUT: Final = "llm.SyncKvCacheWaitTime"
ENABLE_SWITCH_ROLE: Final = "llm.EnableSwitchRole"
ENABLE_CACHE_MANAGER: Final = "llm.EnableCacheManager"
ENABLE_REMOTE_CACHE_ACCESSIBLE: Final = "llm.EnableRemoteCacheAccessible"
MEM_POOL_CFG: Final = "llm.MemPoolConfig"
HOST_MEM_POOL_CFG: Final = "llm.HostMemPoolConfig"
BUF_POOL_CFG: Final = "llm.BufPoolCfg"
RDMA_TRAFFIC_CLASS: Final = "llm.RdmaTrafficClass"
RDMA_SERVICE_LEVEL: Final = "llm.RdmaServiceLevel"
LOCAL_COMM_RES: Final = "llm.LocalCommRes"
TRANSFER_BACKEND: Final = "llm.TransferBackend"
GLOBAL_RESOURCE_CONFIG: Final = "llm.GlobalResourceConfig"
LINK_TOTAL_TIME: Final = "llm.LinkTotalTime"
LINK_RETRY_COUNT: Final = "llm.LinkRetryCount"
DEPLOY_RES_PATH: Final = "llm.deployResPath"
CLUSTER_INFO: Final = "llm.ClusterInfo"
OUTPUT_MAX_SIZE: Final = "llm.OutputMaxSize"
MEM_UTILIZATION: Final = "llm.MemoryUtilization"
GRAPH_MEM_MAX_SIZE: Final = "ge.flowGraphMemMaxSize"
#: ours alone: which path the bytes take
TRANSFER_PATH: Final = "llm_datadist.Path"
#: ours alone: how clusters that link know each other
LINK_SECURITY: Final = "llm_datadist.LinkSecurity"
#: ours alone: whether what was moved is compared by checksum
VERIFY_TRANSFERS: Final = "llm_datadist.VerifyTransfers"
#: ours alone: whether operations are counted
METRICS: Final = "llm_datadist.Metrics"
#: ours alone: whether operations have OpenTelemetry spans
TRACING: Final = "llm_datadist.Tracing"
#: ours alone: over how many threads a large transfer is spread
TRANSFER_THREADS: Final = "llm_datadist.Threads"

_PREFIX: Final = "llm_datadist."
_OURS: Final = (
    TRANSFER_PATH, LINK_SECURITY, VERIFY_TRANSFERS, METRICS, TRACING, TRANSFER_THREADS,
)  # fmt: skip
_KNOWN: Final = frozenset(
    value
    for name, value in tuple(globals().items())
    if isinstance(value, str) and name.isupper() and not name.startswith("_")
)


def check_names(names: Iterable[str]) -> None:
    """Warns of keys that are nearly known; the reference passes over what it does not know.

    One that begins as ours do is refused: LLMException (LLM_PARAM_INVALID). Ours without their
    beginning, or behind another, do nothing: that is said as well.
    """
    for name in names:
        if name in _KNOWN:
            continue
        meant = nearest(name, _KNOWN)
        if meant in _OURS and name.startswith(_PREFIX):
            raise invalid(f"there is no option {name!r}: is {meant!r} meant?")
        if meant is None:
            meant = nearest(_PREFIX + name.rpartition(".")[2], _OURS)
        if meant is not None or name.startswith(_PREFIX):
            warn_of_unknown("init", name, meant)
