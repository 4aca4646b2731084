"""Roles that are switched in a live fleet: announced, and followed."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest

from fleet.members import (
    PASSING,
    PROMPTS,
    SOON_S,
    follow,
    follower_of,
    join,
    linked_ids,
    pulls,
    pulls_soon,
    says,
)
from llm_datadist import LLMException, LLMRole, LLMStatusCode, Wants
from llm_datadist.testing.cluster import Node, NodeProcess
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DECODERS = Wants([LLMRole.DECODER])


@pytest.fixture
def peer() -> Iterator[NodeProcess]:
    with NodeProcess() as process:
        yield process


@pytest.fixture
def decode(node: Node) -> Node:
    node.start(LLMRole.DECODER, 2)
    return node


def switch(node: Node, role: LLMRole, listen: str = "127.0.0.1:0") -> None:
    node.datadist.switch_role(role, {"llm.listenIpInfo": listen})


def role_seen(node: Node, cluster_id: int = 1) -> list[str]:
    return [
        each.record.role
        for each in follower_of(node).members()
        if each.record.cluster_id == cluster_id
    ]


def test_a_role_that_is_wanted_no_more_is_left_and_linked_again_when_it_is_back(
    decode: Node, peer: NodeProcess, tmp_path: Path
) -> None:
    join(peer, tmp_path)
    follow(decode, tmp_path, PROMPTS)
    assert pulls_soon(decode)
    peer.call(switch, LLMRole.DECODER)
    assert eventually(lambda: role_seen(decode) == ["DECODER"], SOON_S)
    assert linked_ids(decode) == []
    assert says(decode, 1, "unfit")
    peer.call(switch, LLMRole.PROMPT)
    assert pulls_soon(decode)


def test_who_wanted_others_wants_none_when_its_own_role_changed(
    decode: Node, peer: NodeProcess, tmp_path: Path
) -> None:
    """Both ends follow: the one that switches has links of its own making, too."""
    with NodeProcess() as other:
        join(other, tmp_path, 3, seed=7)
        peer.call(Node.start, LLMRole.DECODER, 1, listen_ip_info="127.0.0.1:0")
        peer.call(follow, tmp_path, PROMPTS)
        assert peer.call(pulls_soon, 3, 7)
        follow(decode, tmp_path, DECODERS)
        assert eventually(lambda: linked_ids(decode) == [1], SOON_S)
        peer.call(switch, LLMRole.PROMPT)
        assert eventually(lambda: role_seen(decode) == ["PROMPT"], SOON_S)
        assert linked_ids(decode) == []
        assert peer.call(pulls_soon, 3, 7)  # whom it wants has not changed


def test_pulls_that_run_meanwhile_end_right_or_say_so(
    decode: Node, peer: NodeProcess, tmp_path: Path
) -> None:
    join(peer, tmp_path)
    follow(decode, tmp_path, PROMPTS)
    assert pulls_soon(decode)
    is_over, strange = threading.Event(), list[object]()

    def pull() -> None:
        while not is_over.is_set():
            try:
                if not pulls(decode):
                    strange.append("wrong bytes")
            except LLMException as error:
                if error.status_code not in PASSING:
                    strange.append(error)

    puller = threading.Thread(target=pull)
    puller.start()
    try:
        for role in (LLMRole.MIX, LLMRole.PROMPT, LLMRole.DECODER, LLMRole.PROMPT):
            peer.call(switch, role)
    finally:
        is_over.set()
        puller.join()
    assert strange == []
    assert pulls_soon(decode)


def test_a_switch_that_fails_leaves_all_as_it_was(
    decode: Node, peer: NodeProcess, tmp_path: Path
) -> None:
    join(peer, tmp_path)
    follow(decode, tmp_path, PROMPTS)
    assert pulls_soon(decode)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        at = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(LLMException) as caught:
            peer.call(switch, LLMRole.DECODER, at)
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED
    assert pulls_soon(decode)
    assert role_seen(decode) == ["PROMPT"]


def test_a_peer_that_follows_nothing_keeps_the_role_from_being_switched(
    node: Node, peer: NodeProcess, tmp_path: Path
) -> None:
    """It is unlinked in order, and links again, as long as it likes."""
    port = join(peer, tmp_path, sync_kv_timeout=200)
    node.start(LLMRole.DECODER, 2)
    is_over = threading.Event()

    def link() -> None:
        while not is_over.is_set():
            node.link(port, 1)

    linker = threading.Thread(target=link)
    linker.start()
    try:
        assert eventually(lambda: linked_ids(node) == [1], SOON_S)
        status = peer.call(switch_status, LLMRole.DECODER)
    finally:
        is_over.set()
        linker.join()
    assert status in (LLMStatusCode.LLM_EXIST_LINK, LLMStatusCode.LLM_SUCCESS)
    assert peer.call(says_that_it_is_announced)


def switch_status(node: Node, role: LLMRole) -> LLMStatusCode:
    try:
        switch(node, role)
    except LLMException as error:
        return error.status_code
    return LLMStatusCode.LLM_SUCCESS


def says_that_it_is_announced(node: Node) -> bool:
    def is_announced() -> bool:
        fleet = node.datadist.stats().fleet
        return fleet is not None and fleet.is_announced

    return eventually(is_announced, SOON_S)
