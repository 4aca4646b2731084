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
from llm_datadist.testing.timing import eventually, takes_at_most

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


def test_a_peer_that_follows_nothing_does_not_keep_the_role_from_being_switched(
    node: Node, peer: NodeProcess, tmp_path: Path
) -> None:
    """It links again and again; while the role is switched it is refused."""
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
        for role in (LLMRole.DECODER, LLMRole.PROMPT, LLMRole.MIX):
            peer.call(switch, role, f"127.0.0.1:{port}")
    finally:
        is_over.set()
        linker.join()
    assert node.link(port, 1) in (LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_ALREADY_LINK)


def test_a_peer_that_stands_still_does_not_keep_the_role_from_being_switched(
    decode: Node, peer: NodeProcess, tmp_path: Path
) -> None:
    """The one that would have to agree is stopped, and the directory is gone as well."""
    folder = tmp_path / "fleet"
    folder.mkdir()
    join(peer, folder, 1)
    decode.stop()
    decode.start(LLMRole.DECODER, 2, sync_kv_timeout=200)
    follow(decode, folder, PROMPTS)
    assert eventually(lambda: linked_ids(decode) == [1], SOON_S)
    folder.rename(tmp_path / "elsewhere")
    peer.pause()
    with takes_at_most(6.0):
        decode.datadist.switch_role(LLMRole.MIX)
    assert linked_ids(decode) == []
    peer.resume()
    (tmp_path / "elsewhere").rename(folder)
    assert pulls_soon(decode)
