"""Rank tables: where the members of a two-sided link may be found. Spec 5.8, 12.2, 12.3."""

from __future__ import annotations

import hashlib
import ipaddress
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_datadist.errors import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: in this order an entry's fields say on which host a member lives
_HOST_FIELDS = ("host_ip", "server_id", "device_ip")


@dataclass(frozen=True, slots=True)
class Place:
    """One device of a rank table."""

    rank: int | None
    device_id: int
    host: str | None  #: an IP literal, if the table has one


def group_name(comm_name: str, ranks: Mapping[int, int]) -> str:
    """What names a link on both ends: the communicator's name and who takes part."""
    text = json.dumps([comm_name, sorted(ranks.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def parse_rank_table(text: str) -> list[Place]:
    """The devices of a rank table in any of the forms that programs write.

    Fields may be missing, numbers may be strings. Raises LLMException(LLM_LINK_FAILED) for text
    that is no rank table.
    """
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad(f"it is no JSON: {error}") from error
    servers = table.get("server_list") if isinstance(table, dict) else None
    if not isinstance(servers, list) or not all(isinstance(each, dict) for each in servers):
        raise _bad("server_list, a list of objects, is missing")
    return [place for server in servers for place in _places_of(server)]


def hosts_of(places: list[Place], rank: int) -> list[Place]:
    """Where the member of a rank may live: its entry, or all when ranks are missing."""
    ranked = [place for place in places if place.rank == rank]
    return [place for place in ranked or places if place.host is not None]


def _places_of(server: Mapping[str, object]) -> Iterator[Place]:
    devices = server.get("device")
    if not isinstance(devices, list) or not all(isinstance(each, dict) for each in devices):
        raise _bad("device, a list of objects, is missing in an entry of server_list")
    for device in devices:
        fields = {**server, **device}
        yield Place(_number(fields, "rank_id"), _number(fields, "device_id") or 0, _host(fields))


def _number(fields: Mapping[str, object], name: str) -> int | None:
    value = fields.get(name)
    if value is None or value == "":
        return None
    try:
        return int(str(value))
    except ValueError:
        raise _bad(f"{name} is {value!r}, which is no number") from None


def _host(fields: Mapping[str, object]) -> str | None:
    for name in _HOST_FIELDS:
        try:
            return str(ipaddress.ip_address(str(fields.get(name))))
        except ValueError:
            continue
    return None


def _bad(reason: str) -> LLMException:
    return LLMException(f"the rank table cannot be used: {reason}", LLMStatusCode.LLM_LINK_FAILED)
