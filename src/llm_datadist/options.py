"""Options: the option dict, read once and checked into a frozen value. Spec 4.4, 5.1."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, final

from llm_datadist import option_keys as key
from llm_datadist.checks import (
    INT32_MAX,
    UINT32_MAX,
    check_dict,
    check_type,
    is_number,
    parse_number,
)
from llm_datadist.comm_resource import check_resources
from llm_datadist.device_options import Device, parse_cluster_id, parse_devices, parse_listens
from llm_datadist.endpoint import Endpoint
from llm_datadist.errors import invalid
from llm_datadist.link_security import LinkSecurity
from llm_datadist.near_names import nearest, warn_of_unknown
from llm_datadist.pool_config import BufPoolConfig, PoolConfig
from llm_datadist.types import LLMRole

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "BufPoolConfig",
    "Endpoint",
    "Options",
    "PoolConfig",
    "check_transfer_path",
    "parse_listens",
]

#: paths that can be asked for by name; "auto" is the best that both ends have
TRANSFER_PATHS: Final = ("auto", "cma", "tcp", "nixl")
#: entry points by which other packages add transports: name -> factory, see transport/installed.py
TRANSPORT_GROUP: Final = "llm_datadist.transports"
#: gives the path when no option does
PATH_VARIABLE: Final = "LLM_DATADIST_PATH"
#: gives the link security when no option does
SECURITY_VARIABLE: Final = "LLM_DATADIST_LINK_SECURITY"
#: switch counting and spans on when no option says
METRICS_VARIABLE: Final = "LLM_DATADIST_METRICS"
TRACING_VARIABLE: Final = "LLM_DATADIST_TRACING"
#: the first port of rank-table links: links/ranks.py reads it
BASE_PORT_VARIABLE: Final = "LLM_DATADIST_LINK_BASE_PORT"
_VARIABLES: Final = "LLM_DATADIST_"
_OUR_VARIABLES: Final = (
    PATH_VARIABLE, SECURITY_VARIABLE, METRICS_VARIABLE, TRACING_VARIABLE, BASE_PORT_VARIABLE,
)  # fmt: skip

_DEFAULT_SYNC_TIMEOUT_MS: Final = 1000
_MAX_LINK_RETRIES: Final = 100
MAX_TRANSFER_THREADS: Final = 16
#: reserved, not taken, for programs of the v1 mode that say nothing of a pool (spec 12.11)
_V1_POOL_NBYTES: Final = 16 * 2**30


@final
@dataclass(frozen=True, slots=True)
class Options:
    """What a cluster is started with. Spec 4, 5.1."""

    role: LLMRole
    device_id: int = 0
    listen: Endpoint | None = None  #: None: a pure client
    cache_manager: bool = True  #: False is the v1 mode of the reference
    remote_accessible: bool = False  #: one-sided reads and writes; otherwise the owner is asked
    sync_timeout_s: float = 1.0  #: bounds each pull, push and transferred layer
    link_total_time_s: int = 0  #: bounds a rank-table link; 0 is 120
    link_retry_count: int = 1
    device_pool: PoolConfig | None = None
    host_pool: PoolConfig | None = None
    buf_pool: BufPoolConfig | None = None
    transfer_backend: str | None = None  #: "hixl", "nixl" or None
    local_comm_res: str | None = None
    cannot_link: str = ""  #: why `link_clusters` is refused: the reference reads some options then
    enable_switch_role: bool = False
    path: str = "auto"  #: one of TRANSFER_PATHS, or the name of a transport from outside
    link_security: LinkSecurity | None = None
    verify_transfers: bool = False  #: compare a checksum of what was moved with its owner's
    metrics: bool = False  #: count what operations do
    tracing: bool = False  #: an OpenTelemetry span for each operation
    transfer_threads: int = 1  #: over how many threads, or streams, a large transfer is spread
    named_cluster_id: int | None = None  #: of which cluster `llm.ClusterInfo` says that it is
    devices: tuple[Device, ...] = ()  #: those of a process with several; each has its own place
    device_index: int = 0  #: which of several devices these are for
    num_devices: int = 1
    #: of the interface `hixl`, no option: peers send notices, and say how long their transfers may
    #: take; each end links and unlinks for itself
    is_engine: bool = False

    @classmethod
    def parse(cls, role: LLMRole, options: object) -> Options:
        """Read an option dict; it is not changed, and keys that nobody knows are passed over.

        One that is nearly a known key is passed over with a UserWarning, or refused where it begins
        as ours do. Raises TypeError unless it is a dict of str to str; ValueError when the
        listening port is no number of [0, 65535]; LLMException (LLM_PARAM_INVALID) for everything
        else that is refused. Spec 4.4, 5.1, decisions D30 and O34.
        """
        raw = check_dict("options", options, str, str)
        key.check_names(raw)
        _check_variables(raw)
        _check_graph_memory(raw)
        _check_rdma(raw)
        cache_manager = _cache_manager(raw)
        remote_accessible = _remote_accessible(raw)
        devices = parse_devices(raw)
        device_id, listen = devices[0]
        return cls(
            role=_role(role),
            device_id=device_id,
            listen=listen,
            cache_manager=cache_manager,
            remote_accessible=cache_manager and remote_accessible,
            sync_timeout_s=_sync_timeout_ms(raw) / 1000,
            link_total_time_s=_number(raw, key.LINK_TOTAL_TIME, 0, range(INT32_MAX + 1)),
            link_retry_count=_number(raw, key.LINK_RETRY_COUNT, 1, range(1, _MAX_LINK_RETRIES + 1)),
            device_pool=_device_pool(raw, cache_manager),
            host_pool=_pool(raw, key.HOST_MEM_POOL_CFG),
            buf_pool=_buf_pool(raw),
            transfer_backend=_transfer_backend(raw, listen),
            local_comm_res=raw.get(key.LOCAL_COMM_RES),
            cannot_link=check_resources(raw),
            enable_switch_role=raw.get(key.ENABLE_SWITCH_ROLE) == "1",
            path=_path(raw),
            link_security=read_link_security(raw),
            verify_transfers=_flag(raw, key.VERIFY_TRANSFERS),
            metrics=_flag(raw, key.METRICS, METRICS_VARIABLE),
            tracing=_flag(raw, key.TRACING, TRACING_VARIABLE),
            transfer_threads=_number(
                raw, key.TRANSFER_THREADS, _usual_threads(), range(1, MAX_TRANSFER_THREADS + 1)
            ),
            named_cluster_id=parse_cluster_id(raw),
            devices=devices if len(devices) > 1 else (),
            num_devices=len(devices),
        )

    def of_each_device(self) -> list[Options]:
        """Those for the place of each of several devices."""
        return [
            replace(self, device_id=each.device_id, listen=each.listen, devices=(), device_index=i)
            for i, each in enumerate(self.devices)
        ]


def check_transfer_path(name: str, value: object) -> str:
    """`value`, the name of a path. Raises TypeError, LLMException."""
    path = check_type(name, value, str)
    if path not in TRANSFER_PATHS:
        from importlib.metadata import entry_points  # slow to import, and seldom needed

        others = entry_points(group=TRANSPORT_GROUP).names
        if path not in others:
            names = ", ".join((*TRANSFER_PATHS, *sorted(others)))
            raise invalid(f"{name} must be one of {names}, got {path!r}")
    return path


def _check_variables(raw: Mapping[str, str]) -> None:
    """Warns of environment variables that look like ours; of security none is lost in silence.

    Raises LLMException (LLM_PARAM_INVALID) for one that was to secure links which nothing secures.
    """
    known = {each.removeprefix(_VARIABLES): each for each in _OUR_VARIABLES}
    is_open = key.LINK_SECURITY not in raw and not os.environ.get(SECURITY_VARIABLE)
    for name in os.environ:
        plain = name.upper().replace("_", "")
        if name in _OUR_VARIABLES or not plain.startswith(_VARIABLES.replace("_", "")):
            continue
        meant = known.get(nearest(name.upper().removeprefix(_VARIABLES), known) or "")
        if is_open and (meant == SECURITY_VARIABLE or "SECUR" in plain or "SECRET" in plain):
            raise invalid(
                f"init does not know the environment variable {name!r:.80}, and links would "
                f"be open: is {SECURITY_VARIABLE} meant? Else unset it"
            )
        warn_of_unknown("init", name, meant)


def _role(role: object) -> LLMRole:
    if role is None:
        raise invalid("role is None: pass an LLMRole to LLMDataDist")
    return check_type("role", role, LLMRole)


def _check_graph_memory(raw: Mapping[str, str]) -> None:
    text = raw.get(key.GRAPH_MEM_MAX_SIZE)
    if text is not None and not is_number(text):
        raise invalid(f"{key.GRAPH_MEM_MAX_SIZE} must be one number of bytes, got {text!r}")


def _check_rdma(raw: Mapping[str, str]) -> None:
    for name in (key.RDMA_TRAFFIC_CLASS, key.RDMA_SERVICE_LEVEL):
        _number(raw, name, 0, range(UINT32_MAX + 1))


def _cache_manager(raw: Mapping[str, str]) -> bool:
    flag = raw.get(key.ENABLE_CACHE_MANAGER)
    implied = key.LOCAL_COMM_RES in raw
    if implied and flag not in (None, "1"):
        raise invalid(
            f"{key.ENABLE_CACHE_MANAGER} must be 1 when {key.LOCAL_COMM_RES} is given, got {flag!r}"
        )
    if key.TRANSFER_BACKEND in raw and not implied and flag != "1":
        raise invalid(
            f"{key.ENABLE_CACHE_MANAGER} must be 1 when {key.TRANSFER_BACKEND} is given, "
            f"got {flag!r}"
        )
    return implied or flag == "1"


def _remote_accessible(raw: Mapping[str, str]) -> bool:
    flag = raw.get(key.ENABLE_REMOTE_CACHE_ACCESSIBLE)
    if flag not in (None, "0", "1"):
        raise invalid(f"{key.ENABLE_REMOTE_CACHE_ACCESSIBLE} must be 0 or 1, got {flag!r}")
    if flag == "0" and key.TRANSFER_BACKEND in raw:
        raise invalid(
            f"{key.ENABLE_REMOTE_CACHE_ACCESSIBLE} must not be 0 "
            f"when {key.TRANSFER_BACKEND} is given"
        )
    if flag is None:
        return key.LOCAL_COMM_RES in raw or key.TRANSFER_BACKEND in raw
    return flag == "1"


def _transfer_backend(raw: Mapping[str, str], listen: Endpoint | None) -> str | None:
    backend = raw.get(key.TRANSFER_BACKEND)
    if backend is None:
        return None
    if listen is None:
        raise invalid(f"{key.LISTEN_IP_INFO} is needed when {key.TRANSFER_BACKEND} is given")
    if backend not in ("hixl", "nixl"):
        raise invalid(f'{key.TRANSFER_BACKEND} must be "hixl", "nixl" or left out, got {backend!r}')
    return backend


def _sync_timeout_ms(raw: Mapping[str, str]) -> int:
    return _number(raw, key.SYNC_KV_TIMEOUT, _DEFAULT_SYNC_TIMEOUT_MS, range(1, INT32_MAX + 1))


def _device_pool(raw: Mapping[str, str], cache_manager: bool) -> PoolConfig | None:
    pool = _pool(raw, key.MEM_POOL_CFG)
    if pool is not None or cache_manager:
        return pool
    if key.GRAPH_MEM_MAX_SIZE in raw:  # how programs of the v1 mode size their pool, if they do
        return PoolConfig(int(raw[key.GRAPH_MEM_MAX_SIZE]))
    return None if key.BUF_POOL_CFG in raw else PoolConfig(_V1_POOL_NBYTES)


def _pool(raw: Mapping[str, str], name: str) -> PoolConfig | None:
    return PoolConfig.parse(raw[name], name) if name in raw else None


def _buf_pool(raw: Mapping[str, str]) -> BufPoolConfig | None:
    text = raw.get(key.BUF_POOL_CFG)
    return None if text is None else BufPoolConfig.parse(text, key.BUF_POOL_CFG)


def _path(raw: Mapping[str, str]) -> str:
    if key.TRANSFER_PATH in raw:
        return check_transfer_path(key.TRANSFER_PATH, raw[key.TRANSFER_PATH])
    if raw.get(key.TRANSFER_BACKEND) == "nixl":
        return "nixl"
    return check_transfer_path(
        f"the environment variable {PATH_VARIABLE}", os.environ.get(PATH_VARIABLE) or "auto"
    )


def _flag(raw: Mapping[str, str], name: str, variable: str = "") -> bool:
    """Of the option, else of the environment variable, if there is one."""
    flag = raw.get(name)
    if flag is None:
        flag, name = os.environ.get(variable) or "0", f"the environment variable {variable}"
    if flag not in ("0", "1"):
        raise invalid(f"{name} must be 0 or 1, got {flag!r}")
    return flag == "1"


def read_link_security(raw: Mapping[str, str]) -> LinkSecurity | None:
    """What the options say, else the environment. Raises LLMException (LLM_PARAM_INVALID)."""
    if key.LINK_SECURITY in raw:
        return LinkSecurity.parse(raw[key.LINK_SECURITY], key.LINK_SECURITY)
    text = os.environ.get(SECURITY_VARIABLE)
    name = f"the environment variable {SECURITY_VARIABLE}"
    return LinkSecurity.parse(text, name) if text else None


def _usual_threads() -> int:
    # memory is seldom faster with more than four
    return min(4, len(os.sched_getaffinity(0)))


def _number(raw: Mapping[str, str], name: str, default: int, allowed: range) -> int:
    return parse_number(name, raw[name], allowed) if name in raw else default
