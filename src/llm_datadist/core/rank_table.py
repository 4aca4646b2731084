"""Rank tables: where the members of a two-sided link may be found. Spec 5.8, 12.2, 12.3.

What names a link is the communicator's name, its members, and what the table says of each: the
tables of two jobs on the same hosts name other devices, or other addresses. The tables of one link
may differ in order and in what they leave out. So a group's name says field by field what its table
does, as digests, and two names are of one link when nothing that both say differs. Rejected: one
digest of the whole table, for tables that leave something out would never meet.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_datadist.errors import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

#: in this order an entry's fields say on which host a member lives
_HOST_FIELDS = ("host_ip", "server_id", "device_ip")
_NUM_SAID = 1 + len(_HOST_FIELDS)


#: between what a group's name says of one field and of the next
_BETWEEN = "."
_DIGEST_LENGTH = 8


@dataclass(frozen=True, slots=True)
class Place:
    """One device of a rank table."""

    rank: int | None
    device_id: int
    host: str | None  #: an IP literal, if the table has one
    #: what tells the device from others: its number and addresses, each None where it is not said
    said: tuple[str | None, ...]


def group_name(comm_name: str, ranks: Mapping[int, int], places: Sequence[Place] = ()) -> str:
    """What names a link: the communicator's name and who takes part, then what the table says."""
    members = sorted(ranks.items())
    says = [field for _, rank in members for field in _said_of(places, rank)]
    # without ranks it only says which devices take part, if it has all of them
    is_whole = len(places) >= len(ranks) and all(place.rank is None for place in places)
    says.append(json.dumps(sorted(map(json.dumps, _saids(places)))) if is_whole else None)
    fields = ("" if field is None else _digest(field)[:_DIGEST_LENGTH] for field in says)
    return _BETWEEN.join((_digest(json.dumps([comm_name, members])), *fields))


def link_of(name: str) -> str:
    """The part of a group's name that is the same for all its members, whatever their tables."""
    return name.partition(_BETWEEN)[0]


def may_be_one(name: str, other: str) -> bool:
    """Whether two names can be of one group: nothing that both say differs."""
    mine, theirs = name.split(_BETWEEN), other.split(_BETWEEN)
    if mine[0] != theirs[0] or len(mine) != len(theirs):
        return False
    return all(not (a and b) or a == b for a, b in zip(mine, theirs, strict=True))


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


def own_places(places: list[Place], rank: int, device_id: int) -> list[Place]:
    """Which entries may be that of the member itself, the likeliest first.

    Others know a member by its rank. Its device id is in the table as the machine counts, and the
    program's may count otherwise, so it only decides where the rank does not. Where that does not
    either, the position does.
    """
    ranked = [place for place in places if place.rank == rank]
    if ranked or any(place.rank is not None for place in places):
        return sorted(ranked, key=lambda place: place.device_id != device_id)
    by_position = enumerate(places)
    ordered = sorted(by_position, key=lambda at: (at[1].device_id != device_id, at[0] != rank))
    return [place for _, place in ordered]


def _said_of(places: Sequence[Place], rank: int) -> Sequence[str | None]:
    """What the table says of a rank; nothing where several entries have it."""
    ranked = [place.said for place in places if place.rank == rank]
    return ranked[0] if len(ranked) == 1 else (None,) * _NUM_SAID


def _saids(places: Sequence[Place]) -> Iterator[tuple[str | None, ...]]:
    return (place.said for place in places)


def _places_of(server: Mapping[str, object]) -> Iterator[Place]:
    devices = server.get("device")
    if not isinstance(devices, list) or not all(isinstance(each, dict) for each in devices):
        raise _bad("device, a list of objects, is missing in an entry of server_list")
    for device in devices:
        fields = {**server, **device}
        device_id = _number(fields, "device_id")
        addresses = [_address(fields, name) for name in _HOST_FIELDS]
        yield Place(
            _number(fields, "rank_id"),
            device_id or 0,
            next((address for address in addresses if address is not None), None),
            (None if device_id is None else str(device_id), *addresses),
        )


def _number(fields: Mapping[str, object], name: str) -> int | None:
    value = fields.get(name)
    if value is None or value == "":
        return None
    try:
        return int(str(value))
    except ValueError:
        raise _bad(f"{name} is {value!r}, which is no number") from None


def _address(fields: Mapping[str, object], name: str) -> str | None:
    """An IP literal, in the one way to write it."""
    try:
        return str(ipaddress.ip_address(str(fields.get(name))))
    except ValueError:
        return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _bad(reason: str) -> LLMException:
    return LLMException(f"the rank table cannot be used: {reason}", LLMStatusCode.LLM_LINK_FAILED)
