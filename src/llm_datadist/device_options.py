"""The devices of a process, as its options list them. Spec 4.2, 5.1, 7.1; seed 002; decision D30.

A process with several devices gives a list for each of two options: which devices, and where each
of them listens. Programs of the v1 mode may give both in `llm.ClusterInfo`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from llm_datadist import option_keys as key
from llm_datadist.checks import (
    INT32_MAX,
    check_json_object,
    check_list,
    check_type,
    check_uint16,
    check_uint64,
    describe,
    is_number,
    parse_number,
)
from llm_datadist.endpoint import Endpoint, host_of
from llm_datadist.errors import LLMException, invalid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: of `llm.ClusterInfo`, and of each of its `listen_ip_info`
_CLUSTER_FIELDS: Final = ("cluster_id", "listen_ip_info", "logic_device_id")
_LISTEN_FIELDS: Final = ("ip", "port")


class Device(NamedTuple):
    """One device of a process."""

    device_id: int
    listen: Endpoint | None = None  #: None: a pure client


def parse_devices(raw: Mapping[str, str]) -> tuple[Device, ...]:
    """The devices that the options name, at least one, in their order.

    Raises TypeError, ValueError; LLMException (LLM_PARAM_INVALID) for lists of unequal length.
    """
    ids, listens = _device_ids(raw), parse_listens(raw)
    if not listens:
        return tuple(Device(device_id) for device_id in ids)
    if len(ids) != len(listens):
        raise unequal(len(ids), len(listens))
    return tuple(map(Device, ids, listens))


def parse_listens(raw: Mapping[str, str]) -> tuple[Endpoint, ...]:
    """Where the options say to listen, for each device; none when they do not; port 0 is any one.

    Raises LLMException unless they are IP addresses with a port, ValueError when the port is no
    number of [0, 65535]. Spec 5.1 step 5, 5.7.
    """
    text, listed = _either(raw, key.LISTEN_IP_INFO, key.CPP_LISTEN_IP_INFO), _listed(raw)
    if text is None:
        return listed
    listens = tuple(map(_listen, text.split(";")))
    if listed not in ((), listens):
        raise _differ(key.LISTEN_IP_INFO, key.CLUSTER_INFO)
    return listens


def parse_cluster_id(raw: Mapping[str, str]) -> int | None:
    """Of which cluster `llm.ClusterInfo` is, if it says so. Raises TypeError, ValueError."""
    cluster_id = _cluster_info(raw).get("cluster_id")
    return None if cluster_id is None else check_uint64("cluster_id", cluster_id)


def unequal(num_devices: int, num_listens: int) -> LLMException:
    """Of lists that do not go together."""
    return invalid(
        f"{num_devices} device(s) and {num_listens} address(es) to listen on: "
        f"{key.LISTEN_IP_INFO} needs one for each device"
    )


def _device_ids(raw: Mapping[str, str]) -> tuple[int, ...]:
    text = _either(raw, key.DEVICE_ID, key.CPP_DEVICE_ID)
    logical = _logical_ids(raw)
    if text is None:
        return tuple(range(len(logical) or 1))
    ids = tuple(parse_number(key.DEVICE_ID, each, range(INT32_MAX + 1)) for each in text.split(";"))
    if len(set(ids)) < len(ids):
        raise invalid(f"{key.DEVICE_ID} names a device twice: {text!r}")
    if len(logical) not in (0, len(ids)):
        raise invalid(
            f"{key.DEVICE_ID} names {len(ids)} device(s), and logic_device_id of "
            f"{key.CLUSTER_INFO} {len(logical)}"
        )
    return ids


def _logical_ids(raw: Mapping[str, str]) -> list[str]:
    """The devices as `llm.ClusterInfo` names them, by their places in the reference's clusters."""
    name = f"logic_device_id of {key.CLUSTER_INFO}"
    ids = check_list(name, _cluster_info(raw).get("logic_device_id", []), str)
    for each in ids:
        if not all(map(is_number, each.split(":"))):
            raise invalid(f'{name} must be numbers with ":" between them, got {describe(each)}')
    if len(set(ids)) < len(ids):
        raise invalid(f"{name} names a device twice: {describe(ids)}")
    return ids


def _listed(raw: Mapping[str, str]) -> tuple[Endpoint, ...]:
    """Where `llm.ClusterInfo` says to listen."""
    given: list[dict[str, Any]] = check_list(
        f"listen_ip_info of {key.CLUSTER_INFO}", _cluster_info(raw).get("listen_ip_info", []), dict
    )
    return tuple(map(_listed_one, given))


def _listed_one(entry: dict[str, Any]) -> Endpoint:
    name = f"listen_ip_info of {key.CLUSTER_INFO}"
    _check_fields(name, entry, _LISTEN_FIELDS)
    ip = check_type(f"ip of {name}", entry.get("ip"), int, str)
    port = check_uint16(f"port of {name}", entry.get("port"))
    return _literal(Endpoint(host_of(ip), port), name)


def _cluster_info(raw: Mapping[str, str]) -> dict[str, object]:
    text = raw.get(key.CLUSTER_INFO)
    if text is None:
        return {}
    info = check_json_object(key.CLUSTER_INFO, text)
    _check_fields(key.CLUSTER_INFO, info, _CLUSTER_FIELDS)
    return info


def _check_fields(name: str, given: Mapping[str, object], known: Sequence[str]) -> None:
    """A misspelt field would be passed over: a cluster would listen nowhere, without a word."""
    for field in given:
        if field not in known:
            raise invalid(f"{name} has no field {field[:64]!r}: it has {', '.join(known)}")


def _listen(text: str) -> Endpoint:
    return _literal(Endpoint.parse(text, key.LISTEN_IP_INFO, form="ip:port"), key.LISTEN_IP_INFO)


def _literal(listen: Endpoint, name: str) -> Endpoint:
    if not listen.is_literal:
        raise invalid(f"{name} must have an IPv4 or IPv6 address, got {str(listen)!r}")
    return listen


def _either(raw: Mapping[str, str], name: str, cpp_name: str) -> str | None:
    if name in raw and raw.get(cpp_name, raw[name]) != raw[name]:
        raise _differ(name, cpp_name)
    return raw.get(name, raw.get(cpp_name))


def _differ(name: str, other: str) -> LLMException:
    return invalid(f"{name} and {other} are one option and differ: leave one out")
