"""Members of a rank-table link on one host meet whatever else they share. Spec 12.2, 12.3."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import rank_members
import two_hosts
from rank_members import (
    FAILED,
    OK,
    SOON_S,
    Members,
    call_all,
    link,
    link_pair,
    logged,
    pulls,
    record_log,
    seconds_to_settle,
    settle,
    start,
    start_all,
    unlink,
)
from two_hosts import enter_host, leave_host, unshare

from llm_datadist import BlocksCacheKey
from llm_datadist.core.rank_table import group_name
from llm_datadist.links.rendezvous import take_place
from llm_datadist.testing.cluster import Node, NodeProcess, make_array

if TYPE_CHECKING:
    from collections.abc import Iterator

job = rank_members.job
processes = rank_members.processes
members = rank_members.members
mortal = rank_members.mortal
machines, apart = two_hosts.machines, two_hosts.apart

CLONE_NEWNS = 0x00020000
USER = 23464
#: what can be written to without being asked for
WRITABLE = ("/tmp", "/var/tmp", "/dev/shm")


@pytest.fixture
def newcomer(job: str) -> Iterator[NodeProcess]:
    """A process of the same job, to be made another one."""
    with NodeProcess() as process:
        yield process


def paths(node: Node) -> list[str]:
    return [link.path for link in node.datadist.links()]


def link_both(pair: Members, **settings: object) -> None:
    start_all(pair, **settings)
    link_pair(pair)
    assert pair[0].call(pulls, 2)
    assert pair[1].call(pulls, 1)


# -- what the members do not share -----------------------------------------------------------------


def record_warnings(node: Node) -> None:
    record_log(node)
    logging.getLogger("LLM_DATADIST").setLevel(logging.WARNING)


def become_user(node: Node, uid: int) -> None:
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.shows("relies.3")
@pytest.mark.parametrize("is_first", [True, False], ids=["user-first", "root-first"])
def test_members_of_two_users_meet_and_the_log_says_who_it_was(
    members: Members, newcomer: NodeProcess, is_first: bool
) -> None:
    newcomer.call(start, 9)  # it will not be able to read all that this imports
    newcomer.call(Node.stop)
    newcomer.call(become_user, USER)
    pair = [newcomer, members[0]] if is_first else [members[0], newcomer]
    members[0].call(record_warnings)
    link_both(pair)
    assert f"of user {USER}, as cluster {1 if is_first else 2}" in members[0].call(logged)


def change_environment(node: Node, runtime_dir: str | None) -> None:
    os.environ.pop("XDG_RUNTIME_DIR", None)
    if runtime_dir is not None:
        os.environ["XDG_RUNTIME_DIR"] = runtime_dir
    os.environ["TMPDIR"] = "/nowhere"


@pytest.mark.shows("relies.3")
def test_members_with_other_runtime_directories_meet_and_leave_nothing_there(
    members: Members, newcomer: NodeProcess, tmp_path: Path
) -> None:
    newcomer.call(change_environment, str(tmp_path))
    link_both([members[0], newcomer])
    assert list(tmp_path.iterdir()) == []


def lose_directories(node: Node) -> None:
    """As in a container with a read-only root: nothing can be written."""
    unshare(CLONE_NEWNS)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for directory in WRITABLE:
        subprocess.run(["mount", "--bind", directory, directory], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", directory], check=True)
    os.chdir("/proc")


@pytest.mark.shows("relies.3")
def test_a_member_meets_others_where_nothing_can_be_written(
    members: Members, newcomer: NodeProcess
) -> None:
    try:
        newcomer.call(lose_directories)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounts of our own need root: {error}")
    newcomer.call(change_environment, None)
    link_both([newcomer, members[0]])


def join_host(node: Node, pid: int) -> None:
    enter_host(pid)


@pytest.mark.shows("relies.3")
@pytest.mark.parametrize("path", ["auto", "tcp"])
def test_members_meet_while_lo_is_down(job: str, path: str) -> None:
    with ExitStack() as stack:
        pair = [stack.enter_context(NodeProcess()) for _ in range(2)]
        try:
            pair[0].call(leave_host)
            pair[1].call(join_host, pair[0].pid)
        except OSError as error:
            pytest.skip(f"hosts of our own need the right to make namespaces (root): {error}")
        link_both(pair, transfer_path=path)
        assert call_all(pair, paths) == [["cma" if path == "auto" else "tcp"]] * 2


@pytest.mark.shows("relies.3")
def test_members_in_two_pid_namespaces_meet_and_neither_needs_lo(apart: Members) -> None:
    apart[1].call(join_host, apart[0].pid)
    link_both(apart)
    assert call_all(apart, paths) == [["tcp"]] * 2


SECRET = json.dumps({"secret": "a secret of more than sixteen bytes"})
#: more than sockets hold
LARGE = (4, 64, 64 * 1024)


def pulls_much(node: Node, cluster_id: int) -> bool:
    cache, blocks = node.blocks_cache(*LARGE), list(range(LARGE[1]))
    node.manager.pull_blocks(BlocksCacheKey(cluster_id, 7), cache, blocks, blocks[::-1])
    expected = make_array(LARGE, cluster_id)[:, ::-1]
    return bool(np.array_equal(node.arrays[cache.cache_id], expected))


def publish_much(node: Node) -> None:
    own = node.datadist.cluster_id
    node.blocks_cache(*LARGE, seed=own, key=BlocksCacheKey(own, 7))


@pytest.mark.parametrize("security", [None, SECRET], ids=["open", "secret"])
@pytest.mark.parametrize("is_accessible", [False, True], ids=["two-sided", "remote-accessible"])
def test_much_is_pulled_both_ways_by_tcp_over_a_meeting_point(
    members: Members, security: str | None, is_accessible: bool
) -> None:
    pair = members[:2]
    link_both(
        pair, transfer_path="tcp", link_security=security,
        enable_remote_cache_accessible=is_accessible,
    )  # fmt: skip
    assert call_all(pair, endpoints) == [[None], [None]]
    call_all(pair, publish_much)
    assert pair[0].call(pulls_much, 2)
    assert pair[1].call(pulls_much, 1)


def endpoints(node: Node) -> list[tuple[str, int] | None]:
    return [link.endpoint for link in node.datadist.links()]


def test_a_member_without_the_secret_is_not_let_in(members: Members) -> None:
    pair = members[:2]
    for cluster_id, (member, security) in enumerate(zip(pair, (SECRET, None), strict=True), 1):
        member.call(start, cluster_id, link_security=security, link_total_time=1)
        member.call(link)
    assert call_all(pair, settle, 1) == [FAILED, FAILED]


# -- who else has the name -------------------------------------------------------------------------


#: of /proc/net/unix: a socket that listens
LISTENS = "00010000"


def meeting_points(member: NodeProcess) -> set[str]:
    """The names at which a member can be met."""
    fds = Path(f"/proc/{member.pid}/fd")
    own = set()
    for fd in fds.iterdir():
        with suppress(FileNotFoundError):  # it is closed again
            own.add(os.readlink(fd))
    return {name for name, inode in listening() if f"socket:[{inode}]" in own}


def listening() -> Iterator[tuple[str, str]]:
    """The names at which somebody on this host can be met, and the sockets' inodes."""
    for line in Path("/proc/net/unix").read_text().splitlines():
        _, _, _, flags, _, _, inode, *name = line.split()
        if flags == LISTENS and name and name[0].startswith("@llm-datadist-meet-"):
            yield name[0], inode


def name_of(member: NodeProcess) -> str:
    """Where a member is met that is alone with its name."""
    comm_id = member.call(link)
    (name,) = meeting_points(member)
    member.call(unlink, comm_id)
    assert meeting_points(member) == set()
    return name


def squat(name: str) -> socket.socket:
    """Somebody who guessed where a member can be met, and says nothing."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(name.replace("@", "\0"))
    sock.listen()
    return sock


@pytest.mark.shows("relies.3")
@pytest.mark.parametrize("squatted", [0, 1])
@pytest.mark.parametrize("first", [0, 1])
def test_a_stranger_at_the_place_of_a_member_keeps_nobody_from_meeting(
    members: Members, squatted: int, first: int
) -> None:
    pair = members[:2]
    start_all(pair)
    with closing(squat(name_of(pair[squatted]))):
        for member in (pair[first], pair[1 - first]):
            member.call(link)
        settled = [
            member.call(seconds_to_settle, 1 + (member is pair[squatted])) for member in pair
        ]
    assert [status for status, _ in settled] == [OK, OK]
    assert max(seconds for _, seconds in settled) < SOON_S
    assert pair[0].call(pulls, 2)


@pytest.fixture
def all_places(members: Members, job: str) -> Iterator[None]:
    """Somebody is silently at all places where either of two members can be met."""
    group = group_name(f"{job}kv", {1: 0, 2: 1})
    with ExitStack() as stack:
        for cluster_id in (1, 2):
            while (place := take_place(group, cluster_id)) is not None:
                stack.enter_context(closing(place))
        yield


def table_of(host: str | None) -> str:
    """Two members, and where they are."""
    devices = [{"device_id": str(40 + rank), "rank_id": str(rank)} for rank in (0, 1)]
    return json.dumps({"server_list": [{"server_id": host or "1", "device": devices}]})


@pytest.mark.usefixtures("all_places")
def test_members_whose_places_are_all_taken_meet_by_their_addresses(members: Members) -> None:
    pair = members[:2]
    start_all(pair)
    comm_ids = [member.call(link, table=table_of("127.0.0.1")) for member in pair]
    settled = [
        member.call(seconds_to_settle, comm_id)
        for member, comm_id in zip(pair, comm_ids, strict=True)
    ]
    assert [status for status, _ in settled] == [OK, OK]
    assert max(seconds for _, seconds in settled) < SOON_S


@pytest.mark.usefixtures("all_places")
def test_that_nobody_spoke_at_many_places_is_said_in_one_clause(members: Members) -> None:
    member = members[0]
    member.call(record_log)
    start_all([member], link_total_time=2)
    comm_id = member.call(link, table=table_of(None))
    assert member.call(settle, comm_id) is FAILED
    assert "nor at 31 other meeting points of that name" in member.call(logged)
    assert len(member.call(logged)) < 2000


def test_a_stranger_that_talks_nonsense_is_no_member(members: Members) -> None:
    pair = members[:2]
    start_all(pair)
    with closing(squat(name_of(pair[0]))) as stranger:
        pair[1].call(link)
        connection, _ = stranger.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 100)
        pair[0].call(link)
        assert [pair[0].call(settle, 2), pair[1].call(settle, 1)] == [OK, OK]


def test_a_member_that_stands_still_gives_way_to_its_successor(
    members: Members, mortal: NodeProcess
) -> None:
    mortal.call(start, 2)
    mortal.call(link)
    mortal.pause()
    try:
        start_all(members[:2])
        assert members[1].call(link) == 1
        assert members[0].call(link) == 1
        status, seconds = members[0].call(seconds_to_settle, 1)
        assert (status, seconds < SOON_S) == (OK, True)
        assert members[0].call(pulls, 2)
    finally:
        mortal.resume()


def test_nothing_is_left_of_members_that_were_killed_or_stopped(
    members: Members, mortal: NodeProcess
) -> None:
    mortal.call(start, 1)
    mortal.call(link)
    members[1].call(start, 2)
    members[1].call(link, "other")
    names = meeting_points(mortal) | meeting_points(members[1])
    assert len(names) == 2
    mortal.kill()
    members[1].call(Node.stop)
    assert names.isdisjoint(name for name, _ in listening())
