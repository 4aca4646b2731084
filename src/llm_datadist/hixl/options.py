"""The options of `initialize`, read once and checked.

What only hardware means is checked as it is documented, and has no effect. Beside the options of
the interface there are those of this library, whose names begin with `llm_datadist.`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from llm_datadist import option_keys as key
from llm_datadist.checks import check_dict, check_json_object, describe
from llm_datadist.errors import invalid
from llm_datadist.near_names import nearest, warn_of_unknown
from llm_datadist.options import Options
from llm_datadist.types import LLMRole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llm_datadist.hixl.names import EngineName

#: "1": memory that only hardware has; checked, without effect
OPTION_ENABLE_USE_FABRIC_MEM: Final = "EnableUseFabricMem"
#: "N:MB", buffers for memory that is not registered; checked, without effect: there is none
OPTION_BUFFER_POOL: Final = "BufferPool"
#: a multiple of 4 of [0, 255]; checked, without effect
OPTION_RDMA_TRAFFIC_CLASS: Final = "RdmaTrafficClass"
#: [0, 7]; checked, without effect
OPTION_RDMA_SERVICE_LEVEL: Final = "RdmaServiceLevel"
#: JSON: `connect_pool.thread_num`, `connect_pool.task_queue_capacity`, `channel_pool.max_channel`,
#: `channel_pool.high_waterline`, `channel_pool.low_waterline`
OPTION_GLOBAL_RESOURCE_CONFIG: Final = "GlobalResourceConfig"
#: "1": transfers and notices connect by themselves
OPTION_AUTO_CONNECT: Final = "AutoConnect"
#: JSON with a version; checked, without effect
OPTION_LOCAL_COMM_RES: Final = "LocalCommRes"

_KNOWN: Final = (
    OPTION_ENABLE_USE_FABRIC_MEM, OPTION_BUFFER_POOL, OPTION_RDMA_TRAFFIC_CLASS,
    OPTION_RDMA_SERVICE_LEVEL, OPTION_GLOBAL_RESOURCE_CONFIG, OPTION_AUTO_CONNECT,
    OPTION_LOCAL_COMM_RES,
)  # fmt: skip
_OURS: Final = "llm_datadist."
_BUFFERS: Final = re.compile(r"[0-9]{1,10}:[0-9]{1,10}")
_SHARE: Final = re.compile(r"[0-9]{1,3}(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?")
_POOLS: Final = ("connect_pool", "channel_pool")
_VERSIONS: Final = ("1.0", "1.2", "1.3")
_DEFAULT_THREADS: Final = 2
_DEFAULT_QUEUE: Final = 128


@dataclass(frozen=True, slots=True)
class ChannelPool:
    """How many connections of its own an engine keeps."""

    max_channel: int
    #: above so many, idle ones are ended down to `low`; None: none are
    high: int | None = None
    low: int = 0


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine is started with."""

    cluster: Options
    #: transfers connect by themselves
    connects_itself: bool
    connect_threads: int = _DEFAULT_THREADS
    connect_queue: int = _DEFAULT_QUEUE
    #: None: as many connections as are made
    channels: ChannelPool | None = None

    @classmethod
    def parse(cls, name: EngineName, options: object) -> EngineOptions:
        """Of an engine of that name.

        Raises TypeError unless the options are a dict of str to str, LLMException or ValueError for
        what cannot be.
        """
        raw = check_dict("options", options, str, str)
        for each in raw:
            if each not in _KNOWN and not each.startswith(_OURS):
                warn_of_unknown("initialize", each, nearest(each, _KNOWN))
        _check_hardware(raw)
        resources = _Resources(raw.get(OPTION_GLOBAL_RESOURCE_CONFIG) or "{}")
        channels = resources.channels()
        is_auto = raw.get(OPTION_AUTO_CONNECT, "0")
        if is_auto not in ("0", "1"):
            raise invalid(f"{OPTION_AUTO_CONNECT} must be 0 or 1, got {is_auto!r}")
        return cls(
            _cluster_options(name, raw),
            is_auto == "1" or (channels is not None and channels.high is not None),
            resources.number("connect_pool.thread_num", range(1, 65)) or _DEFAULT_THREADS,
            resources.number("connect_pool.task_queue_capacity", range(1, 65536)) or _DEFAULT_QUEUE,
            channels,
        )


class _Resources:
    """GlobalResourceConfig: names with dots, or objects in objects; numbers may be texts."""

    def __init__(self, text: str) -> None:
        """Raises LLMException(LLM_PARAM_INVALID)."""
        self._said: dict[str, object] = {}
        for name, value in check_json_object(OPTION_GLOBAL_RESOURCE_CONFIG, text).items():
            if name in _POOLS and not isinstance(value, dict):
                raise invalid(
                    f"{OPTION_GLOBAL_RESOURCE_CONFIG}: {name} must be an object, got "
                    f"{describe(value)}"
                )
            if isinstance(value, dict):
                self._said.update({f"{name}.{each}": inner for each, inner in value.items()})
            else:
                self._said[name] = value

    def number(self, name: str, allowed: range) -> int | None:
        """None where nothing is said."""
        if name not in self._said:
            return None
        value = self._said[name]
        text = str(value)
        if isinstance(value, bool) or not re.fullmatch("[0-9]{1,10}", text):
            raise _no_number(name, value)
        if int(text) not in allowed:
            raise invalid(
                f"{OPTION_GLOBAL_RESOURCE_CONFIG}: {name} must be a number of "
                f"[{allowed.start}, {allowed.stop - 1}], got {text}"
            )
        return int(text)

    def share(self, name: str) -> float | None:
        """A number of [0, 1]."""
        if name not in self._said:
            return None
        value = self._said[name]
        if isinstance(value, str) and _SHARE.fullmatch(value):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _no_number(name, value)
        if not 0 <= value <= 1:
            raise invalid(f"{OPTION_GLOBAL_RESOURCE_CONFIG}: {name} must be in [0, 1], got {value}")
        return float(value)

    def channels(self) -> ChannelPool | None:
        most = self.number("channel_pool.max_channel", range(1, 513))
        high = self.share("channel_pool.high_waterline")
        low = self.share("channel_pool.low_waterline")
        if (high is None) != (low is None):
            raise invalid(
                f"{OPTION_GLOBAL_RESOURCE_CONFIG}: channel_pool.high_waterline and low_waterline "
                "go together: give both or none"
            )
        if high is None or low is None:
            return None if most is None else ChannelPool(most)
        if low >= high:
            raise invalid(
                f"{OPTION_GLOBAL_RESOURCE_CONFIG}: channel_pool.low_waterline must be below "
                f"high_waterline, got {low} and {high}"
            )
        most = 512 if most is None else most
        return ChannelPool(most, max(1, int(high * most)), int(low * most))


def _no_number(name: str, value: object) -> Exception:
    return invalid(f"{OPTION_GLOBAL_RESOURCE_CONFIG}: {name} is no number: {describe(value)}")


def _check_hardware(raw: Mapping[str, str]) -> None:
    fabric = raw.get(OPTION_ENABLE_USE_FABRIC_MEM, "0")
    if fabric not in ("0", "1"):
        raise invalid(f"{OPTION_ENABLE_USE_FABRIC_MEM} must be 0 or 1, got {fabric!r}")
    buffers = raw.get(OPTION_BUFFER_POOL)
    if buffers is not None:
        if not _BUFFERS.fullmatch(buffers):
            raise invalid(f'{OPTION_BUFFER_POOL} must be "N:MB", as "4:8", got {buffers!r}')
        if fabric == "1" and buffers != "0:0":
            raise invalid(
                f"{OPTION_BUFFER_POOL} and {OPTION_ENABLE_USE_FABRIC_MEM} do not go together"
            )
    for name, allowed in (
        (OPTION_RDMA_TRAFFIC_CLASS, range(0, 256, 4)),
        (OPTION_RDMA_SERVICE_LEVEL, range(8)),
    ):
        text = raw.get(name, "0")
        if not re.fullmatch("[0-9]{1,3}", text) or int(text) not in allowed:
            step = f", a multiple of {allowed.step}" if allowed.step > 1 else ""
            raise invalid(f"{name} must be of [0, {allowed.stop - 1}]{step}, got {text!r}")
    if raw.get(OPTION_LOCAL_COMM_RES):
        said = check_json_object(OPTION_LOCAL_COMM_RES, raw[OPTION_LOCAL_COMM_RES])
        if said.get("version") not in _VERSIONS:
            raise invalid(
                f"{OPTION_LOCAL_COMM_RES} must have a version of {', '.join(_VERSIONS)}, got "
                f"{describe(said.get('version'))}"
            )


def _cluster_options(name: EngineName, raw: Mapping[str, str]) -> Options:
    """What the options and the environment make of the cluster behind the engine."""
    given = {each: value for each, value in raw.items() if each.startswith(_OURS)}
    given[key.ENABLE_CACHE_MANAGER] = given[key.ENABLE_REMOTE_CACHE_ACCESSIBLE] = "1"
    if name.port is not None:
        given[key.LISTEN_IP_INFO] = str(name.endpoint)
    return replace(Options.parse(LLMRole.MIX, given), is_engine=True)
