"""LLMConfig: writes the option dict that `LLMDataDist.init` reads. Spec 4."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar, overload

from llm_datadist import option_keys as key
from llm_datadist.checks import (
    UINT32_MAX,
    check_dict,
    check_int32,
    check_json_object,
    check_list,
    check_optional,
    check_sequence,
    check_type,
    check_uint32,
)
from llm_datadist.endpoint import ipv4_to_int
from llm_datadist.errors import invalid
from llm_datadist.near_names import NamedAttributes
from llm_datadist.options import MAX_TRANSFER_THREADS, check_transfer_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")
DeviceIds: TypeAlias = int | list[int] | tuple[int, ...]


class Option(Generic[T]):
    """One property of LLMConfig: how it is checked, and what it adds to the option dict.

    The value lies in the config under the property's name with an underscore before it. Programs
    know that attribute and assign to it; what they put there counts, unchecked.
    """

    def __init__(
        self,
        doc: str,
        check: Callable[[str, object], T | None],
        emit: Callable[[T], Mapping[str, str]],
        unset: T,
    ) -> None:
        self.__doc__ = doc
        self._check = check
        self._emit = emit
        self._unset = unset

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, config: None, owner: type) -> Option[T]: ...
    @overload
    def __get__(self, config: object, owner: type) -> T: ...
    def __get__(self, config: object, owner: type) -> Option[T] | T:
        if config is None:
            return self
        value = self._stored(config)
        return self._unset if value is None else value

    def __set__(self, config: object, value: T | None) -> None:
        vars(config)[f"_{self._name}"] = self._check(self._name, value)

    def entries(self, config: object) -> Mapping[str, str]:
        """What the option dict gets; nothing when the option is not set."""
        value = self._stored(config)
        return {} if value is None else self._emit(value)

    def _stored(self, config: object) -> T | None:
        value: T | None = vars(config).get(f"_{self._name}")
        return value


def _text(name: str, value: object) -> str | None:
    return check_optional(name, value, str)


def _switch(name: str, value: object) -> bool | None:
    return check_optional(name, value, bool)


def _device_ids(name: str, value: object) -> DeviceIds:
    if not isinstance(value, list | tuple):
        return _device_id(name, value)
    if not value:
        raise invalid(f"{name} must name at least one device, got an empty {type(value).__name__}")
    ids = check_sequence(name, value, int)
    for each in ids:
        _device_id(name, each)
    return ids


def _device_id(name: str, value: object) -> int:
    device_id = check_type(name, value, int)
    if device_id < 0:
        raise invalid(f"{name} must not be negative, got {device_id}")
    return check_int32(name, device_id)


def _milliseconds(name: str, value: object) -> int | str:
    given = check_type(name, value, int, str)
    if isinstance(given, str) and not (given.isascii() and given.isdigit()):
        raise invalid(f"{name} must be a number of milliseconds, got {given!r}")
    if int(given) <= 0:
        raise invalid(f"{name} must be greater than 0, got {given!r}")
    check_int32(name, int(given))
    return given


def _within(low: int, high: int) -> Callable[[str, object], int]:
    def check(name: str, value: object) -> int:
        number = check_type(name, value, int)
        if not low <= number <= high:
            raise invalid(f"{name} must be in [{low}, {high}], got {number}")
        return number

    return check


def _optional_int(name: str, value: object) -> int | None:
    return check_optional(name, value, int)


def _fraction(name: str, value: object) -> float:
    number = check_type(name, value, float)
    if not 0.0 <= number <= 1.0:
        raise invalid(f"{name} must be in [0.0, 1.0], got {number}")
    return number


def _optional_path(name: str, value: object) -> str | None:
    return None if value is None else check_transfer_path(name, value)


def _cluster_info(name: str, value: object) -> str | None:
    text = check_optional(name, value, str)
    if not text:
        return text
    info = check_json_object(name, text)
    for each in check_list(f"listen_ip_info of {name}", info.get("listen_ip_info", []), dict):
        if isinstance(each.get("ip"), str):
            each["ip"] = ipv4_to_int(each["ip"])
    return json.dumps(info)


def _as_is(name: str) -> Callable[[object], dict[str, str]]:
    return lambda value: {name: str(value)}


def _unless_empty(name: str) -> Callable[[str], dict[str, str]]:
    return lambda text: {name: text} if text else {}


def _flag(name: str) -> Callable[[bool], dict[str, str]]:
    return lambda on: {name: "1" if on else "0"}


def _only_when_on(name: str) -> Callable[[bool], dict[str, str]]:
    return lambda on: {name: "1"} if on else {}


def _device_entries(ids: DeviceIds | None) -> dict[str, str]:
    each = [ids] if isinstance(ids, int) else list(ids or ())
    return {key.DEVICE_ID: ";".join(map(str, each)), key.SESSION_DEVICE_ID: str(each[0])}


class LLMConfig(NamedAttributes):
    """Builds the options of `LLMDataDist.init`, one property each. Spec 4.

    Setters raise TypeError for a wrong type, ValueError for a number that does not fit its width,
    LLMException for a value that is not allowed. Assigning None unsets an option, except where it
    is a number that has a range: there it is a TypeError. Assigning to a name that is nearly an
    option's is an AttributeError; another that is no option has no effect, and a UserWarning says
    so, once for each name.
    """

    device_id = Option[DeviceIds | None](
        """The device, or a list of several, for the v1 mode: the cache manager has one. Each is an
        int32 from 0. Spec 4.2, 7.6.""",
        _device_ids,
        _device_entries,
        unset=None,
    )
    sync_kv_timeout = Option[int | str | None](
        """Milliseconds that a pull, a push or a transferred layer may take; an int32 greater than
        0, or its digits. The default is 1000. Spec 4.2, 6.15.""",
        _milliseconds,
        _as_is(key.SYNC_KV_TIMEOUT),
        unset=None,
    )
    listen_ip_info = Option[str](
        """Where to listen: `ip:port` or `[ipv6]:port`, for each of several devices one, with ";"
        between them. Checked by `init`. Spec 4.2, 5.1, 7.6.""",
        _text,
        _unless_empty(key.LISTEN_IP_INFO),
        unset="",
    )
    deploy_res_path = Option[str](
        """Of the v1 mode; without effect. Spec 4.2.""",
        _text,
        _unless_empty(key.DEPLOY_RES_PATH),
        unset="",
    )
    enable_switch_role = Option[bool](
        """Allow `switch_role` in the v1 mode; elsewhere it always is. Spec 4.2, 5.7.""",
        _switch,
        _only_when_on(key.ENABLE_SWITCH_ROLE),
        unset=False,
    )
    enable_cache_manager = Option[bool](
        """Use `cache_manager`, not the `kv_cache_manager` of the v1 mode. Spec 4.2, 4.4.""",
        _switch,
        _flag(key.ENABLE_CACHE_MANAGER),
        unset=False,
    )
    enable_remote_cache_accessible = Option[bool](
        """Access peers' memory without asking them; both ends must agree. Spec 4.2, 4.4.""",
        _switch,
        _flag(key.ENABLE_REMOTE_CACHE_ACCESSIBLE),
        unset=False,
    )
    mem_pool_cfg = Option[str](
        """The device pool as a JSON object: `memory_size` in bytes, and `page_shift` (10 to 30,
        default 16). Checked by `init`. Spec 4.2, 8.1.""",
        _text,
        _unless_empty(key.MEM_POOL_CFG),
        unset="",
    )
    host_mem_pool_cfg = Option[str](
        """The host pool, written as `mem_pool_cfg`. Spec 4.2, 8.3.""",
        _text,
        _unless_empty(key.HOST_MEM_POOL_CFG),
        unset="",
    )
    buf_pool_cfg = Option[str](
        """A pool with size classes as a JSON object. Checked by `init`. Spec 4.2, 7.2.""",
        _text,
        _unless_empty(key.BUF_POOL_CFG),
        unset="",
    )
    rdma_traffic_class = Option[int | None](
        """A uint32 for RDMA hardware of the reference; without effect. Spec 4.2, 4.3.""",
        check_uint32,
        _as_is(key.RDMA_TRAFFIC_CLASS),
        unset=None,
    )
    rdma_service_level = Option[int | None](
        """A uint32 for RDMA hardware of the reference; without effect. Spec 4.2, 4.3.""",
        check_uint32,
        _as_is(key.RDMA_SERVICE_LEVEL),
        unset=None,
    )
    local_comm_res = Option[str](
        """Communication resources of the reference, JSON of a known version: else `link_clusters`
        refuses, or `init` with a `transfer_backend`. Otherwise without effect, but that setting it,
        even to "", turns on the cache manager and remote access. Spec 4.2, 4.4.""",
        _text,
        _as_is(key.LOCAL_COMM_RES),
        unset="",
    )
    transfer_backend = Option[str](
        """Rules of linking and access: "hixl", or unset; needs `listen_ip_info`. Ours alone:
        "nixl", the same rules over the path of this name. Spec 4.2, 4.4.""",
        _text,
        _as_is(key.TRANSFER_BACKEND),
        unset="",
    )
    global_resource_config = Option[str](
        """Settings of the reference's hixl backend, JSON of a known version: else `init` refuses,
        where there is a `transfer_backend`. Otherwise without effect. Spec 4.2, 7.1.""",
        _text,
        _as_is(key.GLOBAL_RESOURCE_CONFIG),
        unset="",
    )
    link_total_time = Option[int](
        """Seconds that a rank-table link may take, 0 for the default. A uint32, but `init` accepts
        an int32 only. Spec 4.2, 4.3.""",
        _within(0, UINT32_MAX),
        _as_is(key.LINK_TOTAL_TIME),
        unset=0,
    )
    link_retry_count = Option[int](
        """How often a rank-table link is tried within its time, 1 to 100. Spec 4.2, 5.8.""",
        _within(1, 100),
        _as_is(key.LINK_RETRY_COUNT),
        unset=1,
    )
    cluster_info = Option[str](
        """Of the v1 mode: JSON that says where to listen (`listen_ip_info`, in which each `ip` is
        stored as a little-endian int) and how many devices there are (`logic_device_id`). `init`
        checks that it contradicts nothing else. Spec 4.2, Appendix C.""",
        _cluster_info,
        _unless_empty(key.CLUSTER_INFO),
        unset="",
    )
    output_max_size = Option[int | None](
        """Of the v1 mode; without effect. Spec 4.2.""",
        _optional_int,
        _as_is(key.OUTPUT_MAX_SIZE),
        unset=None,
    )
    mem_utilization = Option[float](
        """Of the v1 mode: a float of [0.0, 1.0]; without effect, always written. Spec 4.2.""",
        _fraction,
        _as_is(key.MEM_UTILIZATION),
        unset=0.95,
    )
    transfer_path = Option[str](
        """Ours alone: the path that the bytes take, "auto", "cma", "tcp", "nixl", or the name of an
        installed transport. Unset, the environment variable LLM_DATADIST_PATH counts, and "auto"
        without it. The guide Transports says which path is taken when.""",
        _optional_path,
        _unless_empty(key.TRANSFER_PATH),
        unset="",
    )
    link_security = Option[str](
        """Ours alone: JSON that says how clusters that link know each other: {"secret": "..."} or
        {"secret_file": "..."}, or for mutual TLS {"ca": "...", "certificate": "...", "key": "..."}
        with PEM files. Unset, the environment variable LLM_DATADIST_LINK_SECURITY counts; without
        it nobody is asked. The extra `tls` makes TLS faster, on both ends. The guide Security says
        what each protects against.""",
        _text,
        _unless_empty(key.LINK_SECURITY),
        unset="",
    )
    verify_transfers = Option[bool](
        """Ours alone: compares a checksum of all bytes that a pull moved, or that were fetched for
        a peer's push, with one that their owner makes; LLM_FAILED when they differ. Needs the extra
        `integrity`, on both ends. What it costs: the guide Performance.""",
        _switch,
        _flag(key.VERIFY_TRANSFERS),
        unset=False,
    )
    metrics = Option[bool](
        """Ours alone: counts what operations do, for `LLMDataDist.stats`, Prometheus and
        `llm-datadist top`. Unset, the environment variable LLM_DATADIST_METRICS counts ("1"), and
        off without it. More: the guide Observability.""",
        _switch,
        _flag(key.METRICS),
        unset=False,
    )
    tracing = Option[bool](
        """Ours alone: an OpenTelemetry span for each operation; needs the extra `tracing`. Unset,
        the environment variable LLM_DATADIST_TRACING counts, and off without it.""",
        _switch,
        _flag(key.TRACING),
        unset=False,
    )
    transfer_threads = Option[int](
        """Ours alone: over how many threads, and over TCP as many streams, one large transfer is
        spread, 1 to 16. Unset, as many as there are cores, at most four.""",
        _within(1, MAX_TRANSFER_THREADS),
        _as_is(key.TRANSFER_THREADS),
        unset=0,
    )

    def __init__(self) -> None:
        self._ge_options: dict[str, str] = {}
        self._options: dict[str, str] = {}
        self.mem_utilization = 0.95

    @property
    def ge_options(self) -> dict[str, str]:
        """Entries to copy into the options as they are; properties go before them. Spec 4.1, 4.2.

        The setter raises TypeError unless it gets a dict of str to str; None empties it.
        """
        return self._ge_options

    @ge_options.setter
    def ge_options(self, value: dict[str, str] | None) -> None:
        self._ge_options = {} if value is None else check_dict("ge_options", value, str, str)

    @property
    def options(self) -> dict[str, str]:
        """What `generate_options` returned last. Spec 4.1."""
        return self._options

    def generate_options(self) -> dict[str, str]:
        """The option dict, made anew from what is set now (decision O29). Spec 4.1, 4.2."""
        self._options = dict(self._ge_options)
        for option in vars(LLMConfig).values():
            if isinstance(option, Option):
                self._options.update(option.entries(self))
        return self._options

    gen_options = generate_options


LlmConfig = LLMConfig
