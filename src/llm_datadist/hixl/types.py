"""The values of the interface. Their fields may be assigned to, as in the reference."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Final, final

from llm_datadist.checks import UINT32_MAX, check_type, describe
from llm_datadist.hixl.status import PARAM_INVALID, SUCCESS, Status
from llm_datadist.named_enum import NamedIntEnum

FEATURE_NOT_SUPPORTED: Final = 0
FEATURE_SUPPORTED: Final = 1


class MemType(NamedIntEnum):
    """Where registered memory is."""

    MEM_DEVICE = 0  #: here: memory of this process, as MEM_HOST
    MEM_HOST = 1


class TransferOp(NamedIntEnum):
    """Which way a transfer goes."""

    READ = 0  #: from the remote engine to the local one
    WRITE = 1  #: from the local engine to the remote one


class TransferStatus(NamedIntEnum):
    """What has become of an asynchronous transfer."""

    WAITING = 0  #: it waits for its turn, or runs
    COMPLETED = 1  #: all bytes have been moved
    TIMEOUT = 2  #: kept: nobody but the program times an asynchronous transfer out
    FAILED = 3  #: not all bytes have been moved; none will be any more


class AsyncConnectStatus(NamedIntEnum):
    """What has become of the newest task of `connect_async` or `disconnect_async`."""

    NOT_CONNECT = 0  #: there was none, or it disconnected, or what it connected has ended since
    CONNECT_PENDING = 1
    CONNECTING = 2
    CONNECTED = 3
    CONNECT_FAILED = 4
    DISCONNECT_PENDING = 5
    DISCONNECTING = 6


class FeatureType(NamedIntEnum):
    """What `get_capability` can be asked for."""

    AUTO_CONNECT = 0  #: transfers connect by themselves
    CLIENT_SERVER_COMM = 1  #: an engine without a port works with one that has one


@final
@dataclass(slots=True)
class MemDesc:
    """`len` bytes of memory at address `addr`; peers reach them unless `local_only`."""

    addr: int
    len: int
    local_only: bool = False

    def __post_init__(self) -> None:
        """Raises TypeError."""
        self.addr, self.len = as_int("addr", self.addr), as_int("len", self.len)
        check_type("local_only", self.local_only, bool)


@final
@dataclass(slots=True)
class TransferOpDesc:
    """`len` bytes, at `local_addr` here and at `remote_addr` in the remote engine."""

    local_addr: int
    remote_addr: int
    len: int

    def __post_init__(self) -> None:
        """Raises TypeError."""
        if not type(self.local_addr) is type(self.remote_addr) is type(self.len) is int:
            self.local_addr = as_int("local_addr", self.local_addr)
            self.remote_addr = as_int("remote_addr", self.remote_addr)
            self.len = as_int("len", self.len)


@final
@dataclass(slots=True)
class TransferArgs:
    """What goes with an asynchronous transfer: `user_data` comes back with its result."""

    user_data: int = 0

    def __post_init__(self) -> None:
        """Raises TypeError."""
        self.user_data = as_int("user_data", self.user_data)


@final
@dataclass(slots=True)
class GetTransferStatusArgs:
    """At most so many results, and whether to leave out those that are WAITING."""

    max_query_count: int = UINT32_MAX
    skip_waiting: bool = False

    def __post_init__(self) -> None:
        """Raises TypeError."""
        self.max_query_count = as_int("max_query_count", self.max_query_count)
        check_type("skip_waiting", self.skip_waiting, bool)


@final
@dataclass(frozen=True, slots=True)
class TransferResult:
    """The request, the `user_data` of its TransferArgs, and what has become of it."""

    req: int
    user_data: int
    status: TransferStatus


@final
@dataclass(slots=True)
class NotifyDesc:
    """A text with a name, each of at most 1,024 characters."""

    name: str
    notify_msg: str

    def __post_init__(self) -> None:
        """Raises TypeError."""
        check_type("name", self.name, str)
        check_type("notify_msg", self.notify_msg, str)


def as_int(name: str, value: object) -> int:
    """`value`, an int or what counts as one (numpy's), and no bool. Raises TypeError."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} only supports int, got {describe(value)}")
    return index(value)


def get_capability(feature_type: FeatureType | int) -> tuple[Status, int]:
    """Whether a feature is there: (SUCCESS, FEATURE_SUPPORTED or FEATURE_NOT_SUPPORTED).

    Needs no engine. A number that nobody knows is of a feature that is not there, a negative one
    PARAM_INVALID. Raises TypeError.
    """
    feature = as_int("feature_type", feature_type)
    if feature < 0:
        return PARAM_INVALID, FEATURE_NOT_SUPPORTED
    is_there = feature in tuple(FeatureType)
    return SUCCESS, FEATURE_SUPPORTED if is_there else FEATURE_NOT_SUPPORTED
