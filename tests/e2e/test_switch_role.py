"""Switching roles: the listener that opens, moves and closes with it. Spec 5.7."""

from __future__ import annotations

import gc
import json
import logging
import os
import socket
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from llm_datadist import LLMConfig, LLMDataDist, LLMException, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess, cluster_info

if TYPE_CHECKING:
    from collections.abc import Iterator

SUCCESS = LLMStatusCode.LLM_SUCCESS
LINK_FAILED = LLMStatusCode.LLM_LINK_FAILED
INVALID = LLMStatusCode.LLM_PARAM_INVALID
PROMPT, DECODER, MIX = LLMRole.PROMPT, LLMRole.DECODER, LLMRole.MIX
ANY_PORT = "127.0.0.1:0"


def listen(address: str) -> dict[str, str]:
    return {"llm.listenIpInfo": address}


def free_address() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


@contextmanager
def taken_address() -> Iterator[str]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield f"127.0.0.1:{sock.getsockname()[1]}"


def port_of(node: Node) -> int:
    endpoint = node.datadist.listen_endpoint
    assert endpoint is not None
    return endpoint.port


def linked(node: Node) -> int:
    return len(node.datadist.links())


def switch(node: Node, role: Any, options: Any = None) -> LLMStatusCode:
    try:
        node.datadist.switch_role(role, options)
    except LLMException as error:
        return error.status_code
    return SUCCESS


@pytest.fixture
def caller(peer: NodeProcess) -> NodeProcess:
    """Cluster 1, elsewhere, which links to the node here."""
    peer.call(Node.start, DECODER, 1)
    return peer


def reach(caller: NodeProcess, port: int) -> LLMStatusCode:
    """What comes of linking to that port; the link is ended again."""
    status = caller.call(Node.link, port, 2)
    caller.call(Node.unlink, port, 2)  # both ends have given it up when it returns
    return status


@pytest.mark.shows("datadist.switch_role", "datadist.links")
def test_a_client_opens_moves_and_closes_its_listener(node: Node, caller: NodeProcess) -> None:
    node.start(DECODER, 2)
    assert node.datadist.listen_endpoint is None
    first, second = free_address(), free_address()
    assert switch(node, PROMPT, listen(first)) is SUCCESS
    at_first = port_of(node)
    assert str(node.datadist.listen_endpoint) == first
    assert reach(caller, at_first) is SUCCESS
    assert switch(node, MIX, listen(second)) is SUCCESS
    assert str(node.datadist.listen_endpoint) == second
    assert reach(caller, at_first) is LINK_FAILED
    assert reach(caller, port_of(node)) is SUCCESS
    at_second = port_of(node)
    assert switch(node, DECODER) is SUCCESS
    assert node.datadist.listen_endpoint is None
    assert reach(caller, at_second) is LINK_FAILED


@pytest.mark.shows("datadist.switch_role")
@pytest.mark.parametrize("role", [PROMPT, DECODER])
def test_the_same_address_changes_nothing(node: Node, caller: NodeProcess, role: LLMRole) -> None:
    address = free_address()
    node.start(PROMPT, 2, listen_ip_info=address)
    with socket.create_connection(("127.0.0.1", port_of(node))) as waiting:
        assert switch(node, role, listen(address)) is SUCCESS
        assert str(node.datadist.listen_endpoint) == address
        waiting.settimeout(0.2)
        with pytest.raises(TimeoutError):  # the listener kept it: no end of file
            waiting.recv(1)
    assert reach(caller, port_of(node)) is SUCCESS


@pytest.mark.shows("O26")
def test_the_same_port_at_another_address_is_another_listener(node: Node) -> None:
    node.start(PROMPT, 2, listen_ip_info=ANY_PORT)
    port = port_of(node)
    assert switch(node, PROMPT, listen(f"127.0.0.2:{port}")) is SUCCESS
    assert str(node.datadist.listen_endpoint) == f"127.0.0.2:{port}"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
    socket.create_connection(("127.0.0.2", port), timeout=1).close()


def test_a_free_port_can_then_be_asked_for_by_its_number(node: Node, caller: NodeProcess) -> None:
    node.start(PROMPT, 2, listen_ip_info=ANY_PORT)
    port = port_of(node)
    assert switch(node, PROMPT, listen(f"127.0.0.1:{port}")) is SUCCESS
    assert port_of(node) == port
    assert reach(caller, port) is SUCCESS


def test_callers_that_were_just_accepted_are_hung_up_on(node: Node) -> None:
    node.start(PROMPT, 2, listen_ip_info=ANY_PORT)
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port_of(node)), timeout=5) as waiting:
            assert switch(node, DECODER) is SUCCESS
            with suppress(ConnectionResetError):
                assert waiting.recv(1) == b""
        assert switch(node, PROMPT, listen(ANY_PORT)) is SUCCESS
    gc.collect()  # a socket that was left open is a warning, and so an error


def test_an_address_that_is_taken_leaves_the_old_listener(node: Node, caller: NodeProcess) -> None:
    node.start(PROMPT, 2, listen_ip_info=ANY_PORT)
    port = port_of(node)
    with taken_address() as address:
        for _ in range(2):
            assert switch(node, DECODER, listen(address)) is LLMStatusCode.LLM_FAILED
            assert port_of(node) == port
            assert reach(caller, port) is SUCCESS
    assert switch(node, DECODER, listen(address)) is SUCCESS
    assert reach(caller, port) is LINK_FAILED
    assert reach(caller, port_of(node)) is SUCCESS


def test_an_address_that_is_taken_leaves_a_client_a_client(node: Node) -> None:
    node.start(DECODER, 2)
    with taken_address() as address:
        assert switch(node, PROMPT, listen(address)) is LLMStatusCode.LLM_FAILED
    assert node.datadist.listen_endpoint is None


class Standstill(logging.Handler):
    """A program's handler of the log that keeps whoever logs, as one that writes to a full disk."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.has_begun.set()
        self.may_end.wait(60)


def test_a_switch_that_cannot_end_in_time_leaves_the_listener(
    node: Node, caller: NodeProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """And can be made again."""
    caplog.set_level(logging.WARNING, "LLM_DATADIST")
    security = json.dumps({"secret": "a secret of more than sixteen bytes"})
    port = node.start(PROMPT, 1, listen_ip_info=ANY_PORT, link_security=security)
    caller.call(Node.start, DECODER, 2, link_security=security)
    log, standstill = logging.getLogger("LLM_DATADIST"), Standstill()
    log.addHandler(standstill)
    try:
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"not a word of the secret" * 4)
            assert standstill.has_begun.wait(10)
            with pytest.raises(LLMException, match="timed out") as caught:
                node.datadist.switch_role(DECODER, {})
    finally:
        standstill.may_end.set()
        log.removeHandler(standstill)
    assert caught.value.status_code is LLMStatusCode.LLM_TIMEOUT
    assert port_of(node) == port
    assert caller.call(Node.link, port, 1) == SUCCESS
    assert caller.call(Node.unlink, port, 1) == SUCCESS
    node.datadist.switch_role(DECODER, listen(f"127.0.0.1:{port}"))
    assert caller.call(Node.link, port, 1) == SUCCESS
    assert caller.call(Node.unlink, port, 1) == SUCCESS
    node.datadist.switch_role(PROMPT, {})
    assert caller.call(Node.link, port, 1) == LINK_FAILED


def test_an_address_of_no_interface_is_refused(node: Node, caller: NodeProcess) -> None:
    node.start(PROMPT, 2, listen_ip_info=ANY_PORT)
    assert switch(node, PROMPT, listen("192.0.2.1:5000")) is LLMStatusCode.LLM_FAILED
    assert reach(caller, port_of(node)) is SUCCESS


@pytest.mark.shows("error.21")
@pytest.mark.parametrize("options", [None, {}, listen(ANY_PORT)], ids=["none", "empty", "listen"])
@pytest.mark.parametrize("is_ours", [True, False], ids=["we-called", "they-called"])
def test_not_while_linked(
    node: Node, peer: NodeProcess, is_ours: bool, options: dict[str, str] | None
) -> None:
    theirs = peer.call(Node.start, PROMPT, 1, listen_ip_info=ANY_PORT)
    ours = node.start(DECODER, 2, listen_ip_info=ANY_PORT)
    assert (node.link(theirs, 1) if is_ours else peer.call(Node.link, ours, 2)) is SUCCESS
    assert switch(node, DECODER, options) is LLMStatusCode.LLM_EXIST_LINK
    assert peer.call(switch, DECODER, options) is LLMStatusCode.LLM_EXIST_LINK
    assert port_of(node) == ours
    assert [linked(node), peer.call(linked)] == [1, 1]
    if is_ours:
        assert node.unlink(theirs, 1) is SUCCESS
    else:
        assert peer.call(Node.unlink, ours, 2) is SUCCESS
    assert switch(node, DECODER, options) is SUCCESS
    assert peer.call(switch, DECODER, options) is SUCCESS


@pytest.mark.shows("error.21")
def test_not_while_linked_by_a_rank_table(node: Node, caller: NodeProcess) -> None:
    node.start(PROMPT, 2)
    name = f"switch-{os.getpid()}"
    ids = [caller.call(link_ranks, name), link_ranks(node, name)]
    assert ids == [1, 1]
    assert wait_until_linked(node)
    assert caller.call(wait_until_linked)
    assert switch(node, DECODER) is LLMStatusCode.LLM_EXIST_LINK
    node.datadist.unlink(1)
    assert switch(node, DECODER) is SUCCESS


def link_ranks(node: Node, name: str) -> int:
    table = '{"server_list":[{"device":[{}]}]}'
    return node.datadist.link(name, {1: 0, 2: 1}, table)


def wait_until_linked(node: Node) -> bool:
    end, pause = time.monotonic() + 10, threading.Event()
    while not node.datadist.links() and time.monotonic() < end:
        pause.wait(0.01)
    return bool(node.datadist.links())


@pytest.mark.shows("datadist.switch_role")
def test_the_same_role_may_be_asked_for_again_and_again(node: Node) -> None:
    node.start(PROMPT, 2)
    assert [switch(node, PROMPT) for _ in range(3)] == [SUCCESS] * 3
    for role in (DECODER, MIX, PROMPT, DECODER):
        assert switch(node, role, listen(ANY_PORT)) is SUCCESS
        assert switch(node, role) is SUCCESS


@pytest.mark.shows("error.22")
@pytest.mark.parametrize(
    ("role", "options", "expected"),
    [
        (None, None, KeyError),
        (1, None, TypeError),
        ("PROMPT", None, TypeError),
        (True, None, TypeError),
        (PROMPT, [], TypeError),
        (PROMPT, "llm.listenIpInfo", TypeError),
        (PROMPT, {"llm.listenIpInfo": 5}, TypeError),
        (PROMPT, {"llm.listenIpInfo": None}, TypeError),
        (PROMPT, listen("127.0.0.1"), INVALID),
        (PROMPT, listen("127.0.0.1:1:2"), INVALID),
        (PROMPT, listen("nobody:1"), INVALID),
        (PROMPT, listen("127.0.0.1:port"), ValueError),
        (PROMPT, listen("127.0.0.1:65536"), ValueError),
        (PROMPT, listen("127.0.0.1:-1"), ValueError),
    ],
)
def test_arguments_that_are_refused_leave_the_listener(
    node: Node, caller: NodeProcess, role: object, options: object, expected: Any
) -> None:
    node.start(PROMPT, 2, listen_ip_info=ANY_PORT)
    port = port_of(node)
    if expected is INVALID:
        assert switch(node, role, options) is INVALID
    else:
        with pytest.raises(expected):
            switch(node, role, options)
    assert port_of(node) == port
    assert reach(caller, port) is SUCCESS


@pytest.mark.shows("datadist.switch_role")
def test_a_whole_dictionary_of_options_does_no_harm(node: Node, caller: NodeProcess) -> None:
    node.start(DECODER, 2)
    config = LLMConfig()
    config.enable_cache_manager = False
    config.enable_remote_cache_accessible = True
    config.sync_kv_timeout = 1
    config.mem_pool_cfg = "no pool"
    config.listen_ip_info = ANY_PORT
    options = {**config.generate_options(), "unknown": "option"}
    before = dict(options)
    assert switch(node, PROMPT, options) is SUCCESS
    assert options == before
    assert reach(caller, port_of(node)) is SUCCESS


def test_caches_outlive_the_switch(node: Node, caller: NodeProcess) -> None:
    node.start(DECODER, 2)
    cache_id = node.blocks_cache(seed=1).cache_id
    assert switch(node, PROMPT, listen(ANY_PORT)) is SUCCESS
    assert node.blocks_cache().cache_id == cache_id + 1
    node.manager.copy_blocks(node.caches[cache_id], {0: [1]})
    assert (node.arrays[cache_id][:, 1] == node.arrays[cache_id][:, 0]).all()


def test_before_init_there_is_no_role_to_switch() -> None:
    with pytest.raises(RuntimeError, match="not initialized"):
        LLMDataDist(PROMPT, 2).switch_role(DECODER)


@pytest.mark.shows("error.23")
def test_with_a_transfer_backend_the_address_stays(node: Node, peer: NodeProcess) -> None:
    address = free_address()
    node.start(PROMPT, 2, transfer_backend="hixl", listen_ip_info=address)
    peer.call(Node.start, DECODER, 1, transfer_backend="hixl", listen_ip_info=ANY_PORT)
    assert peer.call(Node.link, port_of(node), 2) is SUCCESS
    for options in (None, {}, listen(address)):  # linked or not
        assert switch(node, DECODER, options) is SUCCESS
    elsewhere = listen(free_address())
    assert switch(node, DECODER, elsewhere) is LLMStatusCode.LLM_FEATURE_NOT_ENABLED
    assert str(node.datadist.listen_endpoint) == address
    infos = [cluster_info(port_of(node), 2)]
    assert peer.call(unlink, infos) is SUCCESS


def unlink(node: Node, infos: list[Any]) -> LLMStatusCode:
    return node.datadist.unlink_clusters(infos)[1][0]
