"""Rank tables: which of them can be of one link, and which entry is whose."""

from __future__ import annotations

import json
from itertools import permutations
from typing import Any

import msgspec
import pytest

from llm_datadist.core import messages as m
from llm_datadist.core.rank_table import (
    group_name,
    may_be_one,
    own_places,
    parse_rank_table,
)

RANKS = {1: 0, 2: 1}


def name(*devices: dict[str, Any], ranks: dict[int, int] = RANKS, comm_name: str = "kv") -> str:
    table = {"server_list": [{"device": [device]} for device in devices]}
    return group_name(comm_name, ranks, parse_rank_table(json.dumps(table)))


def device(rank: int | None, device_id: int | None = None, **fields: object) -> dict[str, Any]:
    numbers = {"rank_id": rank, "device_id": device_id}
    return {**{key: number for key, number in numbers.items() if number is not None}, **fields}


PAIR = (device(0, 0, device_ip="10.0.0.1"), device(1, 1, device_ip="10.0.0.2"))


@pytest.mark.parametrize(
    "other",
    [
        PAIR,
        PAIR[::-1],
        (device(0, 0), device(1, 1)),
        (device(0, device_ip="10.0.0.1"),),
        PAIR[1:],
        (),
        (device(None, 7),),
        # an eight-device machine's whole table
        (*PAIR, *(device(rank, rank) for rank in range(2, 8))),
        (device(0, 0, server_id="1"), device(1, 1, server_id="2")),
    ],
    ids=str,
)
def test_tables_that_do_not_contradict_each_other_are_of_one_link(
    other: tuple[dict[str, Any], ...],
) -> None:
    assert may_be_one(name(*PAIR), name(*other))
    assert may_be_one(name(*other), name(*PAIR))


@pytest.mark.parametrize(
    "other",
    [
        (device(0, 2), device(1, 3)),
        (device(0, 0), device(1, 3)),
        (device(0, device_ip="10.0.0.3"),),
        (device(0, 1), device(1, 0)),
    ],
    ids=str,
)
def test_tables_of_other_devices_or_addresses_are_of_two_links(
    other: tuple[dict[str, Any], ...],
) -> None:
    assert not may_be_one(name(*PAIR), name(*other))
    assert not may_be_one(name(*other), name(*PAIR))


@pytest.mark.parametrize("field", ["host_ip", "server_id", "device_ip"])
def test_addresses_are_compared_however_they_are_written(field: str) -> None:
    one = name(device(0, None, **{field: "fd00::1"}))
    assert may_be_one(one, name(device(0, None, **{field: "FD00:0:0::0001"})))
    assert not may_be_one(one, name(device(0, None, **{field: "fd00::2"})))


def test_without_ranks_tables_are_compared_as_wholes_in_any_order() -> None:
    mine = [device(None, 0), device(None, 1)]
    for order in permutations(mine):
        assert may_be_one(name(*mine), name(*order))
    assert not may_be_one(name(*mine), name(device(None, 2), device(None, 3)))


@pytest.mark.parametrize("other", [{"comm_name": "vk"}, {"ranks": {1: 0, 3: 1}}], ids=str)
def test_other_names_and_members_are_of_two_links(other: dict[str, Any]) -> None:
    assert not may_be_one(name(*PAIR), name(*PAIR, **other))


def test_ranks_that_several_have_say_nothing() -> None:
    ranks = {1: 0, 2: 0}
    mine, yours = (device(0, 0), device(0, 1)), (device(0, 1), device(0, 0))
    assert may_be_one(name(*mine, ranks=ranks), name(*yours, ranks=ranks))


def test_the_longest_name_fits_into_a_hello() -> None:
    ranks = {2**64 - number: 2**32 - number for number in range(4, 0, -1)}
    full = [
        device(rank, 2**31 - 1, host_ip="fd00::1", server_id="fd00::2", device_ip="fd00::3")
        for rank in ranks.values()
    ]
    longest = name(*full, ranks=ranks, comm_name="n" * 127)
    said = msgspec.json.decode(msgspec.json.encode(longest), type=m.Text)
    assert said == longest


@pytest.mark.parametrize("text", ["", ".", "....................", "ranks", "." * 4096])
def test_a_name_of_a_strangers_is_none_of_ours(text: str) -> None:
    assert not may_be_one(name(*PAIR), text)


# -- whose entry -----------------------------------------------------------------------------------


def own(devices: tuple[dict[str, Any], ...], rank: int, device_id: int) -> list[int]:
    table = {"server_list": [{"device": list(devices)}]}
    places = parse_rank_table(json.dumps(table))
    return [place.device_id for place in own_places(places, rank, device_id)]


@pytest.mark.parametrize(
    ("devices", "rank", "device_id", "expected"),
    [
        ((device(0, 4), device(1, 6)), 1, 0, [6]),
        ((device(1, 6), device(0, 4)), 1, 4, [6]),  # the rank, whatever the device id
        ((device(None, 4), device(None, 6)), 1, 4, [4, 6]),  # else the device id
        ((device(None, 4), device(None, 6)), 1, 0, [6, 4]),  # else the position
        ((device(0, 4), device(0, 6)), 0, 6, [6, 4]),
        ((device(0, 4),), 1, 4, []),
        ((), 1, 4, []),
    ],
    ids=str,
)
def test_which_entry_is_ones_own(
    devices: tuple[dict[str, Any], ...], rank: int, device_id: int, expected: list[int]
) -> None:
    assert own(devices, rank, device_id) == expected
