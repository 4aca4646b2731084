"""Following a fleet: who is announced is linked; who left, restarted or moved is heard of."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING

import pytest

from directory.records import record
from fleet.members import (
    PROMPTS,
    SOON_S,
    follow,
    follower_of,
    is_linked,
    is_superseded,
    join,
    linked_ids,
    publish,
    pulls,
    pulls_soon,
    says,
    stop_following,
)
from llm_datadist import LLMException, LLMRole, LLMStatusCode, Wants
from llm_datadist.directory import FolderDirectory
from llm_datadist.directory.record import Entry, encode
from llm_datadist.testing.cluster import Node, NodeProcess
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from llm_datadist.core.stats import FleetStats


@pytest.fixture
def peer() -> Iterator[NodeProcess]:
    with NodeProcess() as process:
        yield process


@pytest.fixture
def decode(node: Node) -> Node:
    node.start(LLMRole.DECODER, 2)
    return node


def test_who_is_announced_is_linked_and_pulled_from(
    decode: Node, peer: NodeProcess, tmp_path: Path
) -> None:
    follow(decode, tmp_path, PROMPTS)
    join(peer, tmp_path)
    assert follower_of(decode).wait_for(1, SOON_S)
    assert pulls_soon(decode)
    (link,) = decode.datadist.links()
    (member,) = follower_of(decode).members()
    assert link.incarnation == member.record.incarnation
    assert member.state == "linked"


def test_who_is_announced_is_found_without_a_link(
    decode: Node, peer: NodeProcess, tmp_path: Path
) -> None:
    follow(decode, tmp_path)
    assert follower_of(decode).find(1) is None
    join(peer, tmp_path)
    found = follower_of(decode).find(1, SOON_S)
    assert found is not None
    assert (found.cluster_id, found.role) == (1, "PROMPT")
    assert follower_of(decode).find(3, 0.2) is None
    assert decode.datadist.links() == []


def test_who_withdraws_is_unlinked(decode: Node, peer: NodeProcess, tmp_path: Path) -> None:
    join(peer, tmp_path)
    follow(decode, tmp_path, PROMPTS)
    assert eventually(lambda: is_linked(decode), SOON_S)
    peer.call(stop_following)
    assert eventually(lambda: not decode.datadist.links(), SOON_S)
    assert follower_of(decode).members() == []


def test_who_follows_no_more_is_left_and_may_follow_again(
    decode: Node, peer: NodeProcess, tmp_path: Path
) -> None:
    join(peer, tmp_path)
    follow(decode, tmp_path, PROMPTS)
    assert eventually(lambda: is_linked(decode), SOON_S)
    follower_of(decode).stop()
    follower_of(decode).stop()
    assert eventually(lambda: not decode.datadist.links(), SOON_S)
    assert decode.datadist.stats().fleet is None
    follow(decode, tmp_path, PROMPTS)
    assert eventually(lambda: says(decode, 1, "linked"), SOON_S)


@pytest.mark.parametrize("is_same_port", [True, False], ids=["same-port", "elsewhere"])
def test_a_killed_peer_is_linked_again_when_it_is_back(
    decode: Node, tmp_path: Path, is_same_port: bool
) -> None:
    follow(decode, tmp_path, PROMPTS)
    with NodeProcess() as first:
        port = join(first, tmp_path, seed=5)
        assert pulls_soon(decode, seed=5)
        (before,) = decode.datadist.links()
        first.kill()
    with NodeProcess() as second:
        listen = f"127.0.0.1:{port if is_same_port else 0}"
        join(second, tmp_path, seed=6, listen_ip_info=listen)
        assert pulls_soon(decode, seed=6)
        (after,) = decode.datadist.links()
        assert after.incarnation != before.incarnation
        assert (after.endpoint == before.endpoint) == is_same_port


def test_a_stopped_peer_is_left_and_its_successor_linked_and_it_stays_out(
    decode: Node, tmp_path: Path
) -> None:
    follow(decode, tmp_path, PROMPTS)
    with NodeProcess() as first, NodeProcess() as second:
        join(first, tmp_path, seed=5)
        assert pulls_soon(decode, seed=5)
        first.pause()
        join(second, tmp_path, seed=6)
        assert pulls_soon(decode, seed=6)
        first.resume()
        assert eventually(lambda: first.call(is_superseded), SOON_S)
        assert pulls_soon(decode, seed=6)
        assert [link.cluster_id for link in decode.datadist.links()] == [1]


def test_one_that_left_keeps_no_link_that_it_made_for_itself(node: Node, tmp_path: Path) -> None:
    each_for_itself = {"listen_ip_info": "127.0.0.1:0", "transfer_backend": "hixl"}
    node.start(LLMRole.DECODER, 2, **each_for_itself)
    follow(node, tmp_path, PROMPTS)
    with NodeProcess() as peer:
        peer.call(Node.start, LLMRole.PROMPT, 1, **each_for_itself)
        peer.call(follow, tmp_path, Wants([LLMRole.DECODER]))
        assert eventually(lambda: linked_ids(node) == [1, 1], SOON_S)
        peer.call(stop_following)
        assert eventually(lambda: not linked_ids(node), SOON_S)


def test_a_stopped_peer_is_unlinked_and_linked_again_when_it_goes_on(
    decode: Node, peer: NodeProcess, tmp_path: Path
) -> None:
    join(peer, tmp_path)
    follow(decode, tmp_path, PROMPTS)
    assert pulls_soon(decode)
    peer.pause()
    assert eventually(lambda: not decode.datadist.links(), SOON_S)
    peer.resume()
    assert pulls_soon(decode)


def test_lazily_a_pull_has_the_link_made(decode: Node, peer: NodeProcess, tmp_path: Path) -> None:
    follow(decode, tmp_path, Wants(at_once=False))
    join(peer, tmp_path)
    assert eventually(lambda: says(decode, 1, "known"), SOON_S)
    assert linked_ids(decode) == []
    with pytest.raises(
        LLMException, match=r"is announced at 127\.0\.0\.1:\d+, and is being linked"
    ):
        pulls(decode, 1)
    assert pulls_soon(decode)


def test_who_is_nowhere_announced_is_said_to_be(decode: Node, tmp_path: Path) -> None:
    follow(decode, tmp_path, PROMPTS)
    with pytest.raises(LLMException, match="nobody of that id is announced") as caught:
        pulls(decode, 77)
    assert caught.value.status_code is LLMStatusCode.LLM_NOT_YET_LINK
    assert not follower_of(decode).wait_for(77, 0.1)


def test_who_does_not_fit_is_not_linked(decode: Node, peer: NodeProcess, tmp_path: Path) -> None:
    follow(decode, tmp_path, PROMPTS, facts={"layout": "LBHNC"})
    join(peer, tmp_path)
    assert eventually(lambda: says(decode, 1, "unfit"), SOON_S)
    (member,) = follower_of(decode).members()
    assert member.reason == "its fact 'layout' is None, ours 'LBHNC'"
    with pytest.raises(LLMException, match="it is announced, and does not fit: its fact"):
        pulls(decode, 1)
    assert linked_ids(decode) == []


def test_what_answers_at_an_address_must_be_who_was_announced(
    decode: Node, peer: NodeProcess, tmp_path: Path
) -> None:
    """A record that is out of date, or wrong: another start, or another id, is there."""
    port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0")
    stale = FolderDirectory(tmp_path).announce(record(1, listen=f"127.0.0.1:{port}"), 600)
    incarnation = peer.call(own_incarnation, tmp_path)
    alias = record(3, int(incarnation, 16), listen=f"127.0.0.1:{port}", facts=FACTS)
    other = FolderDirectory(tmp_path).announce(alias, 600)
    stale.change(record(1, listen=f"127.0.0.1:{port}", facts=FACTS))
    follow(decode, tmp_path, PROMPTS)
    assert eventually(lambda: says(decode, 1, "retries") and says(decode, 3, "retries"), SOON_S)
    reasons = {each.record.cluster_id: each.reason for each in follower_of(decode).members()}
    assert all("not the process that was called" in reason for reason in reasons.values())
    assert linked_ids(decode) == []
    for each in (stale, other):
        each.close()


def test_a_folder_that_is_gone_changes_nothing_for_links(
    decode: Node, peer: NodeProcess, tmp_path: Path
) -> None:
    folder = tmp_path / "fleet"
    folder.mkdir()
    join(peer, folder)
    follow(decode, folder, PROMPTS)
    assert pulls_soon(decode)
    (before,) = decode.datadist.links()
    folder.rename(tmp_path / "elsewhere")
    assert eventually(lambda: "cannot read" in _fleet(decode).problem, SOON_S)
    assert eventually(lambda: not _fleet(decode).is_announced or bool(_fleet(decode).problem))
    assert pulls_soon(decode)
    (tmp_path / "elsewhere").rename(folder)
    assert eventually(lambda: not _fleet(decode).problem, SOON_S)
    with NodeProcess() as late:
        join(late, folder, 3, seed=7)
        assert pulls_soon(decode, 3, seed=7)
    assert before in decode.datadist.links()
    assert pulls_soon(decode)


def test_no_more_are_linked_than_wanted(decode: Node, tmp_path: Path) -> None:
    with NodeProcess() as one, NodeProcess() as two, NodeProcess() as three:
        processes = {1: one, 3: two, 4: three}
        for cluster_id, process in processes.items():
            join(process, tmp_path, cluster_id)
        follow(decode, tmp_path, Wants(max_links=2))
        assert eventually(lambda: len(linked_ids(decode)) == 2, SOON_S)
        assert eventually(lambda: len(follower_of(decode).members()) == 3, SOON_S)
        (left_out,) = set(processes) - set(linked_ids(decode))
        assert says(decode, left_out, "known")
        first = linked_ids(decode)[0]
        processes[first].kill()
        assert pulls_soon(decode, left_out)


def test_a_call_that_names_another_gets_it_the_place(decode: Node, tmp_path: Path) -> None:
    with NodeProcess() as one, NodeProcess() as two:
        for cluster_id, process in {1: one, 3: two}.items():
            join(process, tmp_path, cluster_id)
        follow(decode, tmp_path, Wants(max_links=1))
        assert eventually(lambda: len(follower_of(decode).members()) == 2, SOON_S)
        for cluster_id in (1, 3, 1, 3):
            assert pulls_soon(decode, cluster_id)
            assert linked_ids(decode) == [cluster_id]


def test_thousands_of_members_do_not_keep_a_link_waiting(
    decode: Node, peer: NodeProcess, tmp_path: Path
) -> None:
    """Pulls in two-sided mode are answered by the loop's thread, which hears of all of them."""
    peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0")
    peer.call(publish, 5)
    peer.call(follow, tmp_path)
    follow(decode, tmp_path, PROMPTS)
    assert pulls_soon(decode)
    for cluster_id in range(100, 3100):
        said = encode(Entry(record=record(cluster_id, role="DECODER"), ttl_s=600))
        (tmp_path / f".{cluster_id}").write_bytes(said)
    for cluster_id in range(100, 3100):
        (tmp_path / f".{cluster_id}").rename(tmp_path / f"{cluster_id}.json")
    slowest = 0.0
    while _fleet(decode).num_members < 3001:
        begun = time.monotonic()
        assert pulls(decode)
        slowest = max(slowest, time.monotonic() - begun)
    assert slowest < 1.0


def test_stats_say_what_was_done(decode: Node, peer: NodeProcess, tmp_path: Path) -> None:
    join(peer, tmp_path)
    follow(decode, tmp_path, PROMPTS)
    assert pulls_soon(decode)
    fleet = _fleet(decode)
    assert (fleet.num_members, fleet.num_fitting, fleet.num_linked) == (1, 1, 1)
    assert (fleet.joined, fleet.left, fleet.links_made) == (1, 0, 1)
    assert fleet.directory == f"the folder {tmp_path}"
    assert [(each.cluster_id, each.state) for each in fleet.members] == [(1, "linked")]
    told = decode.datadist.stats().told(to_stranger=True).fleet
    assert told is not None
    assert (told.members, told.directory, told.num_linked) == ((), "", 1)


# -- in the peer's process --


def own_incarnation(node: Node, folder: Path) -> str:
    """What it would announce."""
    aside = folder / "aside"
    aside.mkdir()
    follow(node, aside)
    assert eventually(lambda: _fleet(node).is_announced)
    follower_of(node).stop()
    return _incarnation_in(aside)


def _incarnation_in(folder: Path) -> str:
    (name,) = os.listdir(folder)
    text: str = json.loads((folder / name).read_text())["record"]["incarnation"]
    return text


FACTS = {"protocol": "1", "remote accessible": "False"}


def _fleet(node: Node) -> FleetStats:
    fleet = node.datadist.stats().fleet
    assert fleet is not None
    return fleet
