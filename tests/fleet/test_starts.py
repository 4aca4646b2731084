"""Two starts of one cluster id that both live: which one is read, and who links to whom."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from directory.records import record
from fleet.members import (
    PROMPTS,
    SOON_S,
    follow,
    follower_of,
    incarnation_of,
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
from llm_datadist.directory import FolderDirectory, files
from llm_datadist.directory.record import Entry
from llm_datadist.testing.cluster import Node, NodeProcess
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from pathlib import Path

LAZY = Wants([LLMRole.PROMPT], at_once=False)
DECODERS = Wants([LLMRole.DECODER])
ANY_PORT = "127.0.0.1:0"


def announced(node: Node) -> str:
    """The incarnation that the node's fleet has of cluster 1."""
    found = follower_of(node).find(1)
    return "" if found is None else found.incarnation


def test_the_announced_one_is_read(node: Node, tmp_path: Path) -> None:
    """Whoever else has linked to us, and from whichever start: by hand, here."""
    port = node.start(LLMRole.DECODER, 2, listen_ip_info=ANY_PORT, sync_kv_timeout=1000)
    follow(node, tmp_path, LAZY)
    with NodeProcess() as first, NodeProcess() as second:
        join(first, tmp_path, seed=5)
        assert first.call(Node.link, port, 2) is LLMStatusCode.LLM_SUCCESS
        assert pulls_soon(node, seed=5)
        join(second, tmp_path, seed=6)
        before, now = first.call(incarnation_of), second.call(incarnation_of)
        assert eventually(lambda: announced(node) == now, SOON_S)
        first.call(Node.link, port, 2)  # made and cut, or refused
        assert pulls_soon(node, seed=6)
        second.pause()
        assert eventually(lambda: announced(node) != now, SOON_S)
        assert pulls_soon(node, seed=5), "the first one has its place again"
        assert announced(node) == before


def test_one_that_is_not_announced_is_not_read_and_keeps_nobody_out(
    node: Node, tmp_path: Path
) -> None:
    """It was never heard of: we joined behind it; it links to us, and cannot know better."""
    with NodeProcess() as first, NodeProcess() as second:
        for process, seed in ((first, 5), (second, 6)):
            join(process, tmp_path, seed=seed)
        port = node.start(LLMRole.DECODER, 2, listen_ip_info=ANY_PORT, sync_kv_timeout=1000)
        follow(node, tmp_path, LAZY)
        now = second.call(incarnation_of)
        assert eventually(lambda: announced(node) == now, SOON_S)
        assert first.call(Node.link, port, 2) is LLMStatusCode.LLM_SUCCESS
        with pytest.raises(LLMException, match="but for a start of it that is not, or no more"):
            pulls(node, seed=6)
        assert pulls_soon(node, seed=6)


def test_one_that_was_replaced_links_to_nobody(tmp_path: Path) -> None:
    with NodeProcess() as first, NodeProcess() as second, NodeProcess() as other:
        for process in (first, second):
            process.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info=ANY_PORT)
            process.call(follow, tmp_path, DECODERS)
        assert eventually(lambda: first.call(is_superseded), SOON_S)
        other.call(Node.start, LLMRole.DECODER, 3, listen_ip_info=ANY_PORT)
        other.call(follow, tmp_path)
        assert eventually(lambda: second.call(linked_ids) == [3], SOON_S)
        assert eventually(lambda: first.call(says, 3, "known"), SOON_S)
        assert first.call(linked_ids) == []
        assert not first.call(is_announced)
        with pytest.raises(LLMException, match="another start has this cluster's own place"):
            first.call(pulls, 3)
        second.kill()
        assert eventually(lambda: first.call(linked_ids) == [3], SOON_S)
        assert eventually(lambda: first.call(is_announced), SOON_S)


def test_one_that_was_replaced_gives_up_its_links(tmp_path: Path) -> None:
    """It has linked again before it knew; the new start links when a call asks for it."""
    with NodeProcess() as first, NodeProcess() as second, NodeProcess() as other:
        other.call(Node.start, LLMRole.DECODER, 2, listen_ip_info=ANY_PORT)
        other.call(follow, tmp_path)
        first.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info=ANY_PORT)
        first.call(follow, tmp_path, DECODERS, ttl_s=6.0)
        assert eventually(lambda: first.call(linked_ids) == [2], SOON_S)
        second.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info=ANY_PORT)
        second.call(follow, tmp_path, Wants([LLMRole.DECODER], at_once=False), ttl_s=6.0)
        assert eventually(lambda: first.call(is_superseded), SOON_S)
        assert eventually(lambda: first.call(linked_ids) == [], SOON_S)
        assert second.call(links_to, 2)
        assert first.call(linked_ids) == []


def test_one_that_learns_of_it_by_its_last_word_ends_nothing(node: Node, tmp_path: Path) -> None:
    """`stop` ends no link from here, whoever has the place by then."""
    with NodeProcess() as peer:
        port = peer.call(Node.start, LLMRole.PROMPT, 2, listen_ip_info=ANY_PORT)
        peer.call(publish, 5)
        peer.call(follow, tmp_path)
        assert eventually(lambda: (tmp_path / "2.json").exists(), SOON_S)
        record_of_peer = files.read(str(tmp_path / "2.json"), 2)[1]
        peer.call(stop_following)
        assert isinstance(record_of_peer, Entry)
        directory = FolderDirectory(tmp_path)
        directory.announce(record_of_peer.record, 600).close()
        node.start(LLMRole.DECODER, 1, listen_ip_info=ANY_PORT, sync_kv_timeout=1000)
        follow(node, tmp_path, PROMPTS, ttl_s=600.0)
        assert eventually(lambda: linked_ids(node) == [2], SOON_S)
        directory.announce(record(1, 99), 600).close()
        follower = follower_of(node)
        follower.stop()
        assert "has announced itself" in follower.stats().problem
        assert node.link(port, 2) is not LLMStatusCode.LLM_SUCCESS, "the loop has had its turn"
        assert pulls(node, 2)


def test_a_link_that_the_program_makes_itself_is_its_word(node: Node, tmp_path: Path) -> None:
    """To a start that was replaced once, when nobody of its id is announced any more."""
    node.start(LLMRole.DECODER, 2, listen_ip_info=ANY_PORT, sync_kv_timeout=1000)
    follow(node, tmp_path, LAZY)
    with NodeProcess() as first, NodeProcess() as second:
        port = join(first, tmp_path, seed=5)
        assert eventually(lambda: bool(announced(node)), SOON_S)
        join(second, tmp_path, seed=6)
        now = second.call(incarnation_of)
        assert eventually(lambda: announced(node) == now, SOON_S)
        for process in (first, second):
            process.call(stop_following)
        assert eventually(lambda: not announced(node), SOON_S)
        assert node.link(port, 1) is LLMStatusCode.LLM_SUCCESS
        assert pulls(node, seed=5)


def test_a_restart_while_the_directory_is_gone_can_be_linked_by_hand(
    node: Node, tmp_path: Path
) -> None:
    folder = tmp_path / "fleet"
    folder.mkdir()
    node.start(LLMRole.DECODER, 2, listen_ip_info=ANY_PORT, sync_kv_timeout=1000)
    follow(node, folder, PROMPTS)
    with NodeProcess() as first, NodeProcess() as second:
        join(first, folder, seed=5)
        assert eventually(lambda: linked_ids(node) == [1], SOON_S)
        folder.rename(tmp_path / "away")
        first.kill()
        port = second.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info=ANY_PORT)
        second.call(publish, 6)
        assert eventually(lambda: linked_ids(node) == [], SOON_S)
        assert node.link(port, 1) is LLMStatusCode.LLM_SUCCESS
        assert pulls(node, seed=6)
        (tmp_path / "away").rename(folder)
        assert eventually(lambda: not announced(node), SOON_S)
        assert pulls(node, seed=6)


def test_who_is_used_keeps_its_place(node: Node, tmp_path: Path) -> None:
    node.start(LLMRole.DECODER, 2, listen_ip_info=ANY_PORT, sync_kv_timeout=1000)
    follow(node, tmp_path, Wants([LLMRole.PROMPT], at_once=False, max_links=2), ttl_s=15.0)
    with NodeProcess() as one, NodeProcess() as three, NodeProcess() as five:
        for cluster_id, process in {1: one, 3: three, 5: five}.items():
            join(process, tmp_path, cluster_id)
        assert eventually(lambda: len(follower_of(node).members()) == 3, SOON_S)
        for cluster_id in (1, 3):
            assert follower_of(node).wait_for(cluster_id, SOON_S)
        assert pulls(node, 1)
        assert follower_of(node).wait_for(5, SOON_S)
        assert linked_ids(node) == [1, 5]


# -- in a peer's process --


def is_announced(node: Node) -> bool:
    fleet = node.datadist.stats().fleet
    return fleet is not None and fleet.is_announced


def links_to(node: Node, cluster_id: int) -> bool:
    return follower_of(node).wait_for(cluster_id, SOON_S)


def test_a_record_that_copies_an_incarnation_keeps_no_link(node: Node, tmp_path: Path) -> None:
    """The link of a start that was replaced ends, whoever else is said to be at its other end."""
    with NodeProcess() as peer, NodeProcess() as second:
        peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info=ANY_PORT)
        peer.call(follow, tmp_path)
        node.start(LLMRole.DECODER, 2, listen_ip_info=ANY_PORT, sync_kv_timeout=1000)
        follow(node, tmp_path, PROMPTS)
        assert eventually(lambda: linked_ids(node) == [1], SOON_S)
        real = follower_of(node).find(1)
        assert real is not None
        peer.call(stop_following)  # else it cuts the link of the replaced start by itself
        directory = FolderDirectory(tmp_path)
        directory.announce(real, 600.0).close()
        directory.announce(msgspec.structs.replace(real, cluster_id=9), 600.0).close()
        assert eventually(lambda: says_why(node, 9, "cluster 1 answers there"), SOON_S)
        assert eventually(lambda: linked_ids(node) == [1], SOON_S)
        second.call(Node.start, LLMRole.DECODER, 2, listen_ip_info=ANY_PORT)
        second.call(follow, tmp_path, PROMPTS)
        assert eventually(lambda: second.call(linked_ids) == [1], SOON_S)
        assert linked_ids(node) == []


def says_why(node: Node, cluster_id: int, reason: str) -> bool:
    members = follower_of(node).members()
    return any(each.record.cluster_id == cluster_id and reason in each.reason for each in members)
