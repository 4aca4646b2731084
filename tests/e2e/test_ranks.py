"""Rank-table links: members that call on their own, in processes of their own. Spec 5.8, 12."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
import rank_members
from rank_members import (
    FAILED,
    IDS,
    INVALID,
    JOB,
    LINK_FAILED,
    NOT_LINKED,
    OK,
    PREPARING,
    SOON_S,
    TABLE,
    Members,
    call_all,
    link,
    link_and_unlink,
    link_many,
    link_pair,
    link_together,
    pulls,
    query,
    refusal,
    register,
    seconds_of_queries,
    seconds_to_settle,
    settle,
    start,
    start_all,
    unlink,
)

from llm_datadist import LLMException, LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess

if TYPE_CHECKING:
    from collections.abc import Callable

job = rank_members.job
processes = rank_members.processes
members = rank_members.members
pair = rank_members.pair
mortal = rank_members.mortal

# -- linking ---------------------------------------------------------------------------------------


@pytest.mark.shows("datadist.link", "relies.1", "relies.8")
def test_link_returns_at_once_with_ids_that_count_up(pair: Members) -> None:
    begun = time.monotonic()
    assert [pair[0].call(link, f"kv{i}") for i in range(3)] == [1, 2, 3]
    assert time.monotonic() - begun < 2
    assert [pair[0].call(query, comm_id) for comm_id in (1, 2, 3)] == [PREPARING] * 3


@pytest.mark.shows("datadist.link", "relies.1")
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("is_accessible", [False, True], ids=["two-sided", "remote-accessible"])
def test_a_pair_is_linked_when_the_second_calls_and_bytes_go_both_ways(
    members: Members, path: str, is_accessible: bool, first: int
) -> None:
    pair = members[:2]
    start_all(pair, transfer_path=path, enable_remote_cache_accessible=is_accessible)
    early, late = pair[first], pair[1 - first]
    early_id, late_id = first + 1, 2 - first
    assert early.call(link) == 1
    assert early.call(query, 1) is PREPARING
    assert refusal(early, pulls, late_id) is NOT_LINKED
    assert refusal(late, pulls, early_id) is NOT_LINKED
    assert late.call(link) == 1
    assert [late.call(settle, 1), early.call(settle, 1)] == [OK, OK]
    assert early.call(pulls, late_id)
    assert late.call(pulls, early_id)


@pytest.mark.shows("relies.2", "relies.3")
@pytest.mark.parametrize(
    ("mine", "yours"),
    [
        ([{"server_id": "1", "device": [{}]}], [{"server_id": "2", "device": [{}]}]),
        (
            [
                {"server_id": "1", "device": [{"rank_id": "0", "device_id": "0"}]},
                {"server_id": "2", "device": [{"rank_id": "1", "device_id": "1"}]},
            ],
            [
                {"server_id": "2", "device": [{"rank_id": 1, "device_id": 1}]},
                {"server_id": "1", "device": [{"rank_id": 0, "device_id": 0}]},
            ],
        ),
        (
            [{"server_id": "127.0.0.1", "device": [{"device_ip": "127.0.0.1", "rank_id": "0"}]}],
            [{"host_ip": "127.0.0.1", "device": [{"device_id": ""}, {"rank_id": "1"}]}],
        ),
        (
            [{"server_id": "a", "device": [{}]}, {"server_id": "a", "device": [{}]}],
            [],
        ),
    ],
    ids=["one-device", "other-order", "addresses", "twice-and-none"],
)
def test_the_tables_of_the_two_ends_may_differ(
    pair: Members, mine: list[object], yours: list[object]
) -> None:
    for member, servers in zip(pair, (mine, yours), strict=True):
        table = json.dumps({"server_count": "2", "status": "completed", "server_list": servers})
        assert member.call(link, "kv", (1, 2), table) == 1
    assert [member.call(settle, 1) for member in pair] == [OK, OK]
    assert pair[0].call(pulls, 2)
    assert pair[1].call(pulls, 1)


@pytest.mark.shows("relies.2")
def test_the_set_of_members_is_part_of_the_name(members: Members) -> None:
    start_all(members[:3])
    members[0].call(link, "kv", (1, 2))
    members[1].call(link, "kv", (1, 2, 3))
    members[2].call(link, "other", (1, 2, 3))
    assert [member.call(settle, 1, 1.0) for member in members[:3]] == [PREPARING] * 3


@pytest.mark.shows("datadist.link")
def test_three_members_are_linked_when_the_last_has_called(members: Members) -> None:
    start_all(members[:3])
    first, second, third = members[:3]
    for member in (third, first):
        assert member.call(link, "kv", (1, 2, 3)) == 1
    # the two have found each other, and still may not use the link
    assert [first.call(settle, 1, 1.0), third.call(query, 1)] == [PREPARING, PREPARING]
    assert refusal(first, pulls, 3) is NOT_LINKED
    assert refusal(third, pulls, 1) is NOT_LINKED
    second.call(link, "kv", (1, 2, 3))
    assert call_all(members[:3], settle, 1) == [OK] * 3
    for cluster_id, member in enumerate(members[:3], 1):
        assert all(member.call(pulls, other) for other in (1, 2, 3) if other != cluster_id)


@pytest.mark.shows("datadist.link")
def test_four_members_that_call_at_once_are_linked(members: Members) -> None:
    start_all(members)
    for turn in range(3):
        ids = call_all(members, link, "kv", IDS)
        statuses = [member.call(settle, ids[0]) for member in members]
        assert (turn, statuses) == (turn, [OK] * 4)
        assert members[0].call(pulls, 4)
        assert members[3].call(pulls, 2)
        call_all(members, unlink, ids[0])


def test_both_calling_at_the_same_instant_always_ends_linked(pair: Members) -> None:
    for turn in range(20):
        outcome = call_all(pair, link_together, "kv", time.monotonic() + 0.03)
        assert (turn, outcome) == (turn, [OK, OK])


def test_many_links_of_one_pair_are_made_side_by_side(pair: Members) -> None:
    assert call_all(pair, link_many, 16) == [[OK] * 16] * 2
    assert pair[0].call(pulls, 2)


def test_unlinking_and_linking_again_at_once_ends_linked_every_time(pair: Members) -> None:
    assert call_all(pair, link_and_unlink, 10) == [[OK] * 10] * 2


def test_linking_the_same_name_again_without_unlinking_is_another_link(pair: Members) -> None:
    for comm_id in range(1, 11):
        for member in (pair[comm_id % 2], pair[1 - comm_id % 2]):
            assert member.call(link) == comm_id
        assert call_all(pair, settle, comm_id) == [OK, OK]
    assert pair[0].call(pulls, 2)


def test_a_second_link_keeps_the_pair_linked_when_the_first_goes(pair: Members) -> None:
    link_pair(pair, "one")
    link_pair(pair, "two")
    call_all(pair, unlink, 1)
    assert pair[0].call(pulls, 2)
    assert pair[1].call(pulls, 1)
    call_all(pair, unlink, 2)
    assert refusal(pair[0], pulls, 2) is NOT_LINKED


def test_a_cache_registered_after_linking_can_be_pulled(pair: Members) -> None:
    link_pair(pair)
    pair[0].call(register, 9)
    assert pair[1].call(pulls, 1, 9)


def test_remote_accessible_cannot_be_asked_for_after_link(pair: Members) -> None:
    pair[0].call(register, 1, True)
    pair[0].call(link)
    assert refusal(pair[0], register, 2, True) is INVALID
    pair[0].call(register, 3, False)
    pair[0].call(unlink, 1)
    assert refusal(pair[0], register, 4, True) is INVALID


# -- the status ------------------------------------------------------------------------------------


@pytest.mark.shows("datadist.query_register_mem_status", "relies.1")
def test_asking_for_the_status_never_blocks(pair: Members) -> None:
    pair[0].call(link)
    assert pair[0].call(seconds_of_queries, 1, 1000) < 1


@pytest.mark.shows("error.25")
@pytest.mark.parametrize("comm_id", [0, 2, 2**64 - 1])
@pytest.mark.parametrize("call", [query, unlink])
def test_an_id_that_names_no_link(pair: Members, call: Callable[..., Any], comm_id: int) -> None:
    pair[0].call(link)
    assert refusal(pair[0], call, comm_id) is NOT_LINKED


@pytest.mark.parametrize(
    ("comm_id", "expected"),
    [(None, TypeError), ("1", TypeError), (1.0, TypeError), (True, TypeError), (-1, ValueError)],
)
@pytest.mark.parametrize("call", [query, unlink])
def test_an_id_that_is_none(
    pair: Members, call: Callable[..., Any], comm_id: object, expected: type[Exception]
) -> None:
    with pytest.raises(expected):
        pair[0].call(call, comm_id)


def test_several_tries_share_the_total_time(members: Members) -> None:
    members[0].call(start, 1, link_total_time=1, link_retry_count=4)
    comm_id = members[0].call(link)
    status, seconds = members[0].call(seconds_to_settle, comm_id)
    assert status is FAILED
    assert 0.5 < seconds < 3


def test_a_member_that_stands_still_does_not_outlast_the_total_time(
    members: Members, mortal: NodeProcess
) -> None:
    members[0].call(start, 1, link_total_time=1)
    mortal.call(start, 2)
    mortal.call(link)
    mortal.pause()
    try:
        comm_id = members[0].call(link)
        status, seconds = members[0].call(seconds_to_settle, comm_id)
    finally:
        mortal.resume()
    assert status is FAILED
    assert seconds < 4


@pytest.mark.shows("relies.1")
def test_a_member_that_dies_while_linking_fails_the_link_soon(
    members: Members, mortal: NodeProcess
) -> None:
    members[0].call(start, 1)
    mortal.call(start, 2)
    for member in (members[0], mortal):
        assert member.call(link, "kv", (1, 2, 3)) == 1
    assert members[0].call(settle, 1, 1.0) is PREPARING
    mortal.kill()
    status, seconds = members[0].call(seconds_to_settle, 1)
    assert (status, seconds < SOON_S) == (FAILED, True)


def test_a_member_that_restarts_is_found_in_spite_of_what_it_left(
    members: Members, mortal: NodeProcess
) -> None:
    mortal.call(start, 2)
    mortal.call(link)
    mortal.kill()
    start_all(members[:2])
    assert members[0].call(link) == 1
    assert members[0].call(settle, 1, 0.5) is PREPARING
    assert members[1].call(link) == 1
    assert call_all(members[:2], settle, 1) == [OK, OK]
    assert members[0].call(pulls, 2)


# -- unlinking -------------------------------------------------------------------------------------


@pytest.mark.shows("datadist.unlink")
def test_unlinking_while_preparing_withdraws_the_call(pair: Members) -> None:
    pair[0].call(link)
    pair[0].call(unlink, 1)
    assert refusal(pair[0], query, 1) is NOT_LINKED
    pair[1].call(link)
    assert pair[1].call(settle, 1, 0.5) is PREPARING
    assert pair[0].call(link) == 2
    assert [pair[0].call(settle, 2), pair[1].call(settle, 1)] == [OK, OK]


@pytest.mark.shows("datadist.unlink", "datadist.query_register_mem_status", "relies.1")
def test_after_unlink_pulls_fail_and_the_name_can_be_linked_again(pair: Members) -> None:
    link_pair(pair)
    pair[0].call(unlink, 1)
    assert refusal(pair[0], pulls, 2) is NOT_LINKED
    assert refusal(pair[0], query, 1) is NOT_LINKED
    assert pair[1].call(query, 1) is OK  # for good, though the peer has left
    pair[1].call(unlink, 1)
    assert refusal(pair[1], pulls, 1) is NOT_LINKED
    link_pair(pair)
    assert pair[0].call(pulls, 2)
    assert pair[1].call(pulls, 1)


@pytest.mark.shows("datadist.unlink")
def test_unlinking_ends_all_links_of_the_id_and_no_other(members: Members) -> None:
    first, second, third = members[:3]
    start_all(members[:3])
    assert call_all(members[:3], link, "three", (1, 2, 3)) == [1, 1, 1]
    assert call_all(members[:3], settle, 1) == [OK] * 3
    assert call_all([first, second], link, "two") == [2, 2]
    assert call_all([first, second], settle, 2) == [OK, OK]
    first.call(unlink, 1)
    assert refusal(first, query, 1) is NOT_LINKED
    assert refusal(first, pulls, 3) is NOT_LINKED
    assert first.call(pulls, 2), "by the other link"
    assert third.call(pulls, 2)
    assert third.call(eventually_refused, 1) is NOT_LINKED


def eventually_refused(node: Node, cluster_id: int) -> LLMStatusCode:
    """What pulls from a cluster say once it has unlinked."""
    end = time.monotonic() + SOON_S
    while time.monotonic() < end:
        try:
            assert pulls(node, cluster_id)
        except LLMException as error:
            return error.status_code
    return LLMStatusCode.LLM_SUCCESS


def test_the_other_end_notices_an_unlink(pair: Members) -> None:
    link_pair(pair)
    pair[0].call(unlink, 1)
    with pytest.raises(LLMException):
        pair[1].call(pulls, 1)


@pytest.mark.shows("relies.6", "relies.8")
def test_finalize_ends_links_and_preparations(pair: Members) -> None:
    link_pair(pair)
    pair[0].call(link, "other")
    pair[0].call(Node.stop)
    with pytest.raises(LLMException):
        pair[1].call(pulls, 1)
    pair[1].call(unlink, 1)
    pair[0].call(start, 1)
    assert call_all(pair, link) == [1, 2], "after init they count from 1 again"
    assert [pair[0].call(settle, 1), pair[1].call(settle, 2)] == [OK, OK]
    assert pair[1].call(pulls, 1)


# -- refusals --------------------------------------------------------------------------------------


def link_with(node: Node, name: object, ranks: object, table: object) -> int:
    if isinstance(name, str) and name:
        name = (os.environ[JOB] + name)[: max(127, len(name))]
    return node.datadist.link(name, ranks, table)  # type: ignore[arg-type]


@pytest.mark.shows("datadist.link", "error.24")
@pytest.mark.parametrize(
    ("name", "ranks", "table", "expected"),
    [
        (None, {1: 0, 2: 1}, TABLE, TypeError),
        (b"kv", {1: 0, 2: 1}, TABLE, TypeError),
        ("", {1: 0, 2: 1}, TABLE, INVALID),
        ("n" * 128, {1: 0, 2: 1}, TABLE, INVALID),
        ("kv", None, TABLE, TypeError),
        ("kv", [(1, 0), (2, 1)], TABLE, TypeError),
        ("kv", {"1": 0, "2": 1}, TABLE, TypeError),
        ("kv", {1: "0", 2: "1"}, TABLE, TypeError),
        ("kv", {1: 0, 2: True}, TABLE, TypeError),
        ("kv", {1: 0, -2: 1}, TABLE, ValueError),
        ("kv", {1: 0, 2**64: 1}, TABLE, ValueError),
        ("kv", {1: 0, 2: -1}, TABLE, ValueError),
        ("kv", {1: 0, 2: 2**32}, TABLE, ValueError),
        ("kv", {}, TABLE, INVALID),
        ("kv", {1: 0}, TABLE, INVALID),
        ("kv", {1: 0, 2: 1, 3: 2, 4: 3, 5: 4}, TABLE, INVALID),
        ("kv", {1: 1, 2: 0}, TABLE, INVALID),
        ("kv", {2: 0, 3: 1}, TABLE, INVALID),
        ("kv", {1: 0, 2: 1}, None, TypeError),
        ("kv", {1: 0, 2: 1}, {"server_list": []}, TypeError),
        # the order of the checks
        ("", None, TABLE, INVALID),
        ("kv", {1: 0}, None, TypeError),
        ("kv", {2: 0, 3: 1}, "garbage", INVALID),
    ],
)
def test_arguments_that_are_refused(
    pair: Members,
    name: object,
    ranks: object,
    table: object,
    expected: type[Exception] | LLMStatusCode,
) -> None:
    if isinstance(expected, LLMStatusCode):
        assert refusal(pair[0], link_with, name, ranks, table) is expected
    else:
        with pytest.raises(expected):
            pair[0].call(link_with, name, ranks, table)
    assert pair[0].call(link) == 1  # no id was used up


@pytest.mark.parametrize("ranks", [{2: 0, 1: 1}, {1: 0, 2: 0}, {1: 5, 2: 9}])
def test_ranks_need_only_ascend(pair: Members, ranks: dict[int, int]) -> None:
    assert call_all(pair, link_with, "n" * 127, ranks, TABLE) == [1, 1]
    assert call_all(pair, settle, 1) == [OK, OK]


@pytest.mark.parametrize(
    "table",
    [
        "",
        "garbage",
        "null",
        "[]",
        "{}",
        '{"server_list": {}}',
        '{"server_list": [1]}',
        '{"server_list": [{}]}',
        '{"server_list": [{"device": [3]}]}',
        '{"server_list": [{"device": [{"rank_id": "one"}]}]}',
        '{"server_list": [{"device": [{"device_id": []}]}]}',
        "[" * 100_000,
    ],
    ids=lambda table: table[:30],
)
def test_a_rank_table_that_is_none(pair: Members, table: str) -> None:
    assert refusal(pair[0], link, "kv", (1, 2), table) is LINK_FAILED
    assert pair[0].call(link) == 1


def link_so_often(node: Node, times: int) -> None:
    for count in range(times):
        link(node, f"kv{count}")


def test_so_many_links_may_be_outstanding(pair: Members) -> None:
    pair[0].call(link_so_often, 512)
    assert refusal(pair[0], link) is INVALID
    pair[0].call(unlink, 7)
    assert pair[0].call(link) == 513


@pytest.mark.shows("error.23")
def test_with_a_transfer_backend_there_are_no_rank_table_links(members: Members) -> None:
    member = members[0]
    member.call(start, 1, transfer_backend="hixl", listen_ip_info="127.0.0.1:0")
    expected = LLMStatusCode.LLM_FEATURE_NOT_ENABLED
    assert refusal(member, link) is expected
    assert refusal(member, query, 1) is expected
    assert refusal(member, unlink, 1) is expected


@pytest.mark.shows("relies.2")
def test_each_end_may_put_itself_first(pair: Members) -> None:
    for member, ranks in zip(pair, ({1: 0, 2: 0}, {2: 0, 1: 0}), strict=True):
        assert member.call(link_with, "kv", ranks, TABLE) == 1
    assert call_all(pair, settle, 1) == [OK, OK]
