"""Which calls to `link` mean the same link: names, members, and what tables say. Spec 12.2."""

from __future__ import annotations

import json

import numpy as np
import pytest
import rank_members
from rank_members import (
    FAILED,
    OK,
    Members,
    call_all,
    link,
    link_pair,
    logged,
    pulls,
    query,
    record_log,
    settle,
    start,
    start_all,
    unlink,
)

from llm_datadist import BlocksCacheKey
from llm_datadist.testing.cluster import Node, make_array

job = rank_members.job
processes = rank_members.processes
members = rank_members.members

# -- two jobs --------------------------------------------------------------------------------------


def table_of(job: int, field: str) -> str:
    """A rank table of one host; only that field tells one job's from the other's."""
    devices: list[dict[str, object]] = [
        {"device_id": str(rank), "device_ip": f"192.168.1.{rank + 1}", "rank_id": str(rank)}
        for rank in range(2)
    ]
    server: dict[str, object] = {"server_id": "127.0.0.1", "host_ip": "127.0.0.1"}
    for rank, device in enumerate(devices):
        if field in ("device_id", "both without ranks"):
            device["device_id"] = 2 * job + rank
        if field in ("device_ip", "both without ranks"):
            device["device_ip"] = f"192.168.1.{2 * job + rank + 1}"
        if field == "both without ranks":
            del device["rank_id"]
    if field in ("server_id", "host_ip"):
        server[field] = f"127.0.0.{job + 1}"
    if job:
        devices.reverse()
    return json.dumps({"server_list": [{**server, "device": devices}]})


FIELDS = ["device_id", "device_ip", "server_id", "host_ip", "both without ranks"]


@pytest.mark.shows("relies.2")
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 1, 3, 2), (2, 1, 0, 3)], ids=str)
def test_two_jobs_with_the_same_names_and_other_devices_are_not_mixed_up(
    members: Members, field: str, order: tuple[int, ...]
) -> None:
    """Of the four, 0 and 2 are one job's prefill and decode, 1 and 3 the other's."""
    for index, member in enumerate(members):
        # two ids for each job, by which `pulls` knows whose bytes came
        member.call(start, index // 2 + 1)
        member.call(seed, index)
    for index in order:
        assert members[index].call(link, "kv", (1, 2), table_of(index % 2, field)) == 1
    assert call_all(members, settle, 1) == [OK] * 4
    for index, member in enumerate(members):
        assert member.call(pulls_seed, 2 - index // 2, (index + 2) % 4)


def seed(node: Node, number: int) -> None:
    cluster_id = node.datadist.cluster_id
    node.blocks_cache(*rank_members.SHAPE, seed=100 + number, key=key_of(cluster_id))


def key_of(cluster_id: int) -> BlocksCacheKey:
    return BlocksCacheKey(cluster_id, 7)


def pulls_seed(node: Node, cluster_id: int, number: int) -> bool:
    cache = node.blocks_cache(*rank_members.SHAPE)
    node.manager.pull_blocks(key_of(cluster_id), cache, [3], [3])
    expected = make_array(rank_members.SHAPE, 100 + number)[:, 3]
    return bool(np.array_equal(node.arrays[cache.cache_id][:, 3], expected))


def test_a_member_waits_on_while_only_another_job_is_there(members: Members) -> None:
    pair = members[:2]
    start_all(pair, link_total_time=2)
    for number, member in enumerate(pair):
        member.call(record_log)
        member.call(link, "kv", (1, 2), table_of(number, "device_id"))
    assert call_all(pair, settle, 1) == [FAILED, FAILED]
    assert "is not linking by such a rank table now" in pair[1].call(logged)
    assert "has no host_ip" not in pair[1].call(logged), "they are there"


def test_tables_that_leave_something_out_are_of_the_same_link(members: Members) -> None:
    pair = members[:2]
    start_all(pair)
    short = {"server_list": [{"device": [{"rank_id": 1, "device_id": 1}]}]}
    for member, table in zip(pair, (table_of(0, "device_id"), json.dumps(short)), strict=True):
        member.call(link, "kv", (1, 2), table)
    assert call_all(pair, settle, 1) == [OK, OK]


# -- two links of one name -------------------------------------------------------------------------


def test_a_link_of_the_same_name_ends_alone(members: Members) -> None:
    """Both were made at the same meeting point."""
    pair = members[:2]
    start_all(pair, transfer_path="tcp")
    link_pair(pair)
    link_pair(pair)
    call_all(pair, unlink, 2)
    assert call_all(pair, query, 1) == [OK, OK]
    third = [member.call(link) for member in pair]
    assert third == [3, 3]
    assert call_all(pair, settle, 3) == [OK, OK]
    assert pair[0].call(pulls, 2)
    assert pair[1].call(pulls, 1)
