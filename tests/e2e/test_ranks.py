"""Rank-table links: members that call on their own, in processes of their own. Spec 5.8, 12.1-12.3.

The members find each other in a runtime directory of the tests' own.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    LLMException,
    LLMRole,
    LLMStatusCode,
    RegisterMemStatus,
)
from llm_datadist.testing.cluster import Node, NodeProcess, make_array

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

OK, PREPARING, FAILED = RegisterMemStatus.OK, RegisterMemStatus.PREPARING, RegisterMemStatus.FAILED
NOT_LINKED = LLMStatusCode.LLM_NOT_YET_LINK
INVALID = LLMStatusCode.LLM_PARAM_INVALID
LINK_FAILED = LLMStatusCode.LLM_LINK_FAILED
TABLE = '{"server_list":[{"device":[{}]}]}'
SHAPE = (2, 8, 64)
IDS = (1, 2, 3, 4)
SOON_S = 5.0

Members = list[NodeProcess]


@pytest.fixture(scope="module")
def runtime_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where processes that are started meanwhile meet."""
    path = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(path))
        yield path


@pytest.fixture(scope="module")
def processes(runtime_dir: Path) -> Iterator[Members]:
    with ExitStack() as stack:
        yield [stack.enter_context(NodeProcess()) for _ in IDS]


@pytest.fixture
def members(processes: Members) -> Iterator[Members]:
    """Processes without nodes, which are stopped after the test."""
    yield processes
    for process in processes:
        process.call(Node.stop)


@pytest.fixture
def pair(members: Members) -> Members:
    """Clusters 1 and 2."""
    start_all(members[:2])
    return members[:2]


@pytest.fixture
def mortal(runtime_dir: Path) -> Iterator[NodeProcess]:
    """A process to be killed or stopped, in the same runtime directory."""
    with NodeProcess() as process:
        yield process


# -- run by the members ----------------------------------------------------------------------------


def start(node: Node, cluster_id: int, **settings: Any) -> None:
    role = LLMRole.PROMPT if cluster_id == 1 else LLMRole.DECODER
    node.start(role, cluster_id, **settings)
    node.blocks_cache(*SHAPE, seed=cluster_id, key=BlocksCacheKey(cluster_id, 0))


def link(node: Node, name: str = "kv", ids: tuple[int, ...] = (1, 2), table: str = TABLE) -> int:
    return node.datadist.link(name, {each: rank for rank, each in enumerate(ids)}, table)


def unlink(node: Node, comm_id: int) -> None:
    node.datadist.unlink(comm_id)


def query(node: Node, comm_id: int) -> RegisterMemStatus:
    return node.datadist.query_register_mem_status(comm_id)


def settle(node: Node, comm_id: int, within_s: float = 20.0) -> RegisterMemStatus:
    """The status once it is not PREPARING any more, or after that time."""
    end, pause = time.monotonic() + within_s, threading.Event()
    while (status := query(node, comm_id)) is PREPARING and time.monotonic() < end:
        pause.wait(0.01)
    return status


def seconds_to_settle(node: Node, comm_id: int) -> tuple[RegisterMemStatus, float]:
    begun = time.monotonic()
    return settle(node, comm_id), time.monotonic() - begun


def seconds_of_queries(node: Node, comm_id: int, count: int) -> float:
    begun = time.monotonic()
    for _ in range(count):
        assert query(node, comm_id) is PREPARING
    return time.monotonic() - begun


def pulls(node: Node, cluster_id: int, model_id: int = 0) -> bool:
    """Whether the blocks of a cluster, which a seed tells, arrive here."""
    cache = node.blocks_cache(*SHAPE)
    key = BlocksCacheKey(cluster_id, model_id)
    node.manager.pull_blocks(key, cache, [5, 1, 2], [0, 7, 3])
    expected = np.zeros(SHAPE, dtype=np.uint8)
    expected[:, [0, 7, 3]] = make_array(SHAPE, cluster_id)[:, [5, 1, 2]]
    return bool(np.array_equal(node.arrays[cache.cache_id], expected))


def register(node: Node, model_id: int, remote_accessible: bool | None = None) -> int:
    own = node.datadist.cluster_id
    key = BlocksCacheKey(own, model_id)
    return node.blocks_cache(
        *SHAPE, seed=own, key=key, remote_accessible=remote_accessible
    ).cache_id


def link_together(node: Node, name: str, at: float) -> RegisterMemStatus:
    """Links at that moment of the clock that all processes share."""
    threading.Event().wait(max(0.0, at - time.monotonic() - 0.005))
    while time.monotonic() < at:
        pass
    comm_id = link(node, name)
    status = settle(node, comm_id)
    node.datadist.unlink(comm_id)
    return status


def link_many(node: Node, count: int) -> list[RegisterMemStatus]:
    statuses: list[RegisterMemStatus] = []

    def one(name: str) -> None:
        statuses.append(settle(node, link(node, name)))

    threads = [threading.Thread(target=one, args=(f"kv{i}",)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


def link_and_unlink(node: Node, rounds: int) -> list[RegisterMemStatus]:
    """Each round at once after the one before."""
    statuses = []
    for _ in range(rounds):
        comm_id = link(node)
        statuses.append(settle(node, comm_id))
        node.datadist.unlink(comm_id)
    return statuses


def status_of_link(node: Node, table: str) -> RegisterMemStatus | LLMStatusCode:
    """What becomes soon of a link to a member that is not there, if it can be called for at all."""
    try:
        comm_id = link(node, "kv", (1, 77), table)
    except LLMException as error:
        return error.status_code
    return settle(node, comm_id, SOON_S)


_logged: list[str] = []


class Recorder(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _logged.append(record.getMessage())


def record_log(node: Node) -> None:
    _logged.clear()
    logger = logging.getLogger("LLM_DATADIST")
    if not any(isinstance(handler, Recorder) for handler in logger.handlers):
        logger.addHandler(Recorder())


def logged(node: Node) -> str:
    return "\n".join(_logged)


def use_runtime_dir(node: Node, path: str) -> None:
    os.environ["XDG_RUNTIME_DIR"] = path


# -- run by the tests ------------------------------------------------------------------------------


def start_all(members: Members, **settings: Any) -> None:
    for cluster_id, member in enumerate(members, 1):
        member.call(start, cluster_id, **settings)


def call_all(members: Members, function: Callable[..., Any], *args: object) -> list[Any]:
    """Runs it in all at the same time; waits for all of them even when one raises."""
    results: list[Any] = []
    errors: list[Exception] = []
    for member in members:
        member.begin(function, *args)
    for member in members:
        try:
            results.append(member.result())
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return results


def link_pair(pair: Members, *args: object) -> None:
    ids = call_all(pair, link, *args)
    assert [member.call(settle, each) for member, each in zip(pair, ids, strict=True)] == [OK, OK]


def refusal(member: NodeProcess, function: Callable[..., Any], *args: object) -> LLMStatusCode:
    with pytest.raises(LLMException) as error:
        member.call(function, *args)
    return error.value.status_code


# -- linking ---------------------------------------------------------------------------------------


def test_link_returns_at_once_with_ids_that_count_up(pair: Members) -> None:
    begun = time.monotonic()
    assert [pair[0].call(link, f"kv{i}") for i in range(3)] == [1, 2, 3]
    assert time.monotonic() - begun < 2
    assert [pair[0].call(query, comm_id) for comm_id in (1, 2, 3)] == [PREPARING] * 3


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


def test_the_set_of_members_is_part_of_the_name(members: Members) -> None:
    start_all(members[:3])
    members[0].call(link, "kv", (1, 2))
    members[1].call(link, "kv", (1, 2, 3))
    members[2].call(link, "other", (1, 2, 3))
    assert [member.call(settle, 1, 1.0) for member in members[:3]] == [PREPARING] * 3


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


def test_asking_for_the_status_never_blocks(pair: Members) -> None:
    pair[0].call(link)
    assert pair[0].call(seconds_of_queries, 1, 1000) < 1


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


def test_an_absent_member_fails_the_link_in_time_and_the_log_says_who(members: Members) -> None:
    member = members[0]
    member.call(start, 1, link_total_time=1)
    member.call(record_log)
    servers = [{"server_id": "x", "device": [{"rank_id": 0}]}]
    comm_id = member.call(link, "kv", (1, 77), json.dumps({"server_list": servers}))
    status, seconds = member.call(seconds_to_settle, comm_id)
    assert status is FAILED
    assert 0.5 < seconds < 3
    says = member.call(logged)
    assert "cluster 77" in says
    assert "this host" in says
    assert [member.call(query, comm_id) for _ in range(2)] == [FAILED, FAILED]
    member.call(unlink, comm_id)
    assert refusal(member, query, comm_id) is NOT_LINKED


def test_the_log_says_at_which_address_a_member_was_looked_for(members: Members) -> None:
    member = members[0]
    member.call(start, 1, link_total_time=1)
    member.call(record_log)
    servers = [{"host_ip": "192.0.2.7", "device": [{"rank_id": "1", "device_id": "3"}]}]
    comm_id = member.call(link, "kv", (1, 77), json.dumps({"server_list": servers}))
    status, seconds = member.call(seconds_to_settle, comm_id)
    assert (status, seconds < 3) == (FAILED, True)
    assert "192.0.2.7:60003" in member.call(logged)


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


@pytest.mark.parametrize("device_id", ["9999", "-60001", "100000000000"])
def test_a_device_id_that_gives_no_port_fails_the_link_in_time(
    members: Members, device_id: str
) -> None:
    member = members[0]
    member.call(start, 1, link_total_time=1)
    servers = [{"host_ip": "192.0.2.7", "device": [{"rank_id": 1, "device_id": device_id}]}]
    table = json.dumps({"server_list": servers})
    status = member.call(status_of_link, table)
    assert status in (LINK_FAILED, INVALID, FAILED)


def test_an_own_device_id_that_gives_no_port_still_links_on_this_host(members: Members) -> None:
    pair = members[:2]
    start_all(pair, device_id=9999)
    servers = [
        {"host_ip": "127.0.0.1", "device": [{"rank_id": 0, "device_id": 9999}]},
        {"host_ip": "192.0.2.7", "device": [{"rank_id": 1, "device_id": 1}]},
    ]
    link_pair(pair, "kv", (1, 2), json.dumps({"server_list": servers}))


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


def test_unlinking_while_preparing_withdraws_the_call(pair: Members) -> None:
    pair[0].call(link)
    pair[0].call(unlink, 1)
    assert refusal(pair[0], query, 1) is NOT_LINKED
    pair[1].call(link)
    assert pair[1].call(settle, 1, 0.5) is PREPARING
    assert pair[0].call(link) == 2
    assert [pair[0].call(settle, 2), pair[1].call(settle, 1)] == [OK, OK]


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


def test_the_other_end_notices_an_unlink(pair: Members) -> None:
    link_pair(pair)
    pair[0].call(unlink, 1)
    with pytest.raises(LLMException):
        pair[1].call(pulls, 1)


def test_finalize_ends_links_and_preparations(pair: Members) -> None:
    link_pair(pair)
    pair[0].call(link, "other")
    pair[0].call(Node.stop)
    with pytest.raises(LLMException):
        pair[1].call(pulls, 1)
    pair[1].call(unlink, 1)
    pair[0].call(start, 1)
    link_pair(pair)
    assert pair[1].call(pulls, 1)


# -- refusals --------------------------------------------------------------------------------------


def link_with(node: Node, name: object, ranks: object, table: object) -> int:
    return node.datadist.link(name, ranks, table)  # type: ignore[arg-type]


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


def test_with_a_transfer_backend_there_are_no_rank_table_links(members: Members) -> None:
    member = members[0]
    member.call(start, 1, transfer_backend="hixl", listen_ip_info="127.0.0.1:0")
    expected = LLMStatusCode.LLM_FEATURE_NOT_ENABLED
    assert refusal(member, link) is expected
    assert refusal(member, query, 1) is expected
    assert refusal(member, unlink, 1) is expected


@pytest.mark.parametrize("what", ["file", "open-directory", "dangling-link"])
def test_a_runtime_directory_that_is_not_ours_alone_is_refused(
    members: Members, runtime_dir: Path, tmp_path: Path, what: str
) -> None:
    taken = tmp_path / "llm-datadist"
    if what == "file":
        taken.touch()
    elif what == "dangling-link":
        taken.symlink_to(tmp_path / "nowhere")
    else:
        taken.mkdir()
        taken.chmod(0o777)
    member = members[0]
    member.call(start, 1)
    member.call(use_runtime_dir, str(tmp_path))
    try:
        assert refusal(member, link) is LINK_FAILED
    finally:
        member.call(use_runtime_dir, str(runtime_dir))
    assert member.call(link) == 1
