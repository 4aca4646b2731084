"""Listeners made by hand that break the protocol: at the hand-shake, and in every answer."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from wire import NONCE, PROBE, TRAILER, Wire, impostor, owner

from llm_datadist import BlocksCacheKey, LLMException, LLMRole, LLMStatusCode
from llm_datadist.core import messages as m
from llm_datadist.core.packed import columns_of
from llm_datadist.testing.cluster import Node, NodeProcess, cluster_info, make_array
from llm_datadist.testing.timing import eventually, takes_at_most
from llm_datadist.transport.base import PROBE_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable

SUCCESS = LLMStatusCode.LLM_SUCCESS
FAILED = LLMStatusCode.LLM_FAILED
TIMEOUT = LLMStatusCode.LLM_TIMEOUT
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
PARAM_INVALID = LLMStatusCode.LLM_PARAM_INVALID

SYNC_TIMEOUT_MS = 500
SHAPE = (2, 4, 4096)


def budget_s(timeout_ms: int) -> float:
    """A fifth over the timeout, and what two busy cores need to schedule a few threads."""
    return 1.2 * timeout_ms / 1000 + 0.1


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# -- at the hand-shake -----------------------------------------------------------------------------

WELCOME = m.Welcome(m.PROTOCOL_VERSION, 1, b"a peer by hand..", NONCE, {"tcp": b""}, PROBE)
FRAME = m.encode(WELCOME)
BAD_TEXT = m.encode(m.Refused(5, "abcd")).replace(b"abcd", b"\xff\xfe\xff\xfe")


@pytest.mark.shows("link.garbage", "link.both_rolled_back")
@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", id="http"),
        pytest.param(b"\x15\x03\x01\x00\x02\x02\x16", id="tls-alert"),
        pytest.param(FRAME[:-1], id="truncated"),
        pytest.param(FRAME[:3], id="half-a-header"),
        pytest.param(m.HEADER.pack(m.MAGIC, 2**32 - 1), id="huge-length"),
        pytest.param(m.HEADER.pack(m.MAGIC, 4) + b"\x93\x01\x02\x03", id="unknown-fields"),
        pytest.param(m.HEADER.pack(m.MAGIC, 0), id="empty-body"),
        pytest.param(BAD_TEXT, id="bad-text"),
        pytest.param(m.encode(m.Linked("tcp")), id="linked-too-early"),
        pytest.param(m.encode(m.Attached()), id="wrong-type"),
        pytest.param(m.encode(m.Refused(0, "it went well")), id="refused-with-success"),
        pytest.param(m.encode(m.Refused(424242, "?")), id="refused-with-unknown-status"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_what_listens_there_is_no_cluster(node: Node, answer: bytes) -> None:
    node.start(LLMRole.DECODER, 2)
    before = descriptors()

    def serve(wire: Wire) -> None:
        wire.expect(m.Hello)
        wire.hang_up(answer)

    with impostor(serve) as port, takes_at_most(2.0):
        assert node.link(port, 1, 10_000) == FAILED
    assert node.datadist.links() == []
    assert eventually(lambda: descriptors() <= before)


@pytest.mark.parametrize("says_hello", [False, True])
def test_a_connection_that_is_reset_is_a_status_and_no_exception(
    node: Node, says_hello: bool
) -> None:
    node.start(LLMRole.DECODER, 2)
    before = descriptors()

    def serve(wire: Wire) -> None:
        if says_hello:
            wire.receive_bytes(1)
        wire.hang_up(hard=True)

    with impostor(serve) as port, takes_at_most(5.0):
        statuses = {node.link(port, 1) for _ in range(50)}
    assert statuses <= {FAILED, LLMStatusCode.LLM_LINK_FAILED}
    assert eventually(lambda: descriptors() <= before)


def test_a_version_that_differs_is_named(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    node.start(LLMRole.DECODER, 2)

    def serve(wire: Wire) -> None:
        wire.expect(m.Hello)
        wire.send(m.Welcome(99, 1, b"a peer by hand..", NONCE, {"tcp": b""}, PROBE))
        assert wire.expect(m.Refused).status == PARAM_INVALID

    with impostor(serve) as port:
        assert node.link(port, 1) == PARAM_INVALID
    assert "protocol 1, its peer 99" in caplog.text


def silent_after_hello(wire: Wire) -> None:
    wire.expect(m.Hello)
    assert wire.is_ended()


def silent_on_streams(wire: Wire) -> None:
    if isinstance(wire.receive(), m.Hello):
        wire.send(WELCOME)
    assert wire.is_ended()


def silent_about_the_probe(wire: Wire) -> None:
    if isinstance(wire.receive(), m.Hello):
        wire.send(WELCOME)
    else:
        wire.send(m.Attached())
    assert wire.is_ended()


def silent_in_the_middle_of_the_probe(wire: Wire) -> None:
    if isinstance(wire.receive(), m.Hello):
        wire.send(WELCOME)
    else:
        wire.send(m.Attached())
        _, lengths = columns_of(wire.expect(m.Read).columns, 2)
        wire.send(m.Sending(int(lengths.sum())))
        wire.send_bytes(NONCE[:7])
    assert wire.is_ended()


def silent_after_ready(wire: Wire) -> None:
    if isinstance(wire.receive(), m.Hello):
        wire.send(WELCOME)
    else:
        wire.send(m.Attached())
        wire.serve_probe()
    assert wire.is_ended()


@pytest.mark.shows("link.silent")
@pytest.mark.parametrize(
    "serve",
    [
        silent_after_hello,
        silent_on_streams,
        silent_about_the_probe,
        silent_in_the_middle_of_the_probe,
        silent_after_ready,
    ],
)
def test_a_peer_that_falls_silent_is_a_timeout_wherever_it_does(
    node: Node, serve: Callable[[Wire], None]
) -> None:
    node.start(LLMRole.DECODER, 2)
    before = descriptors()
    with impostor(serve) as port:
        for _ in range(3):
            begun = time.monotonic()
            assert node.link(port, 1, 300) == TIMEOUT
            assert 0.3 <= time.monotonic() - begun <= budget_s(300)
    assert node.datadist.links() == []
    assert eventually(lambda: descriptors() <= before)


def test_a_peer_that_is_not_who_it_says_is_not_linked(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """Its memory does not hold the nonce that it told."""
    node.start(LLMRole.DECODER, 2)

    def serve(wire: Wire) -> None:
        if isinstance(wire.receive(), m.Hello):
            wire.send(WELCOME)
            wire.expect(m.Refused)
        else:
            wire.send(m.Attached())
            wire.expect(m.Read)
            wire.send(m.Sending(PROBE_NBYTES))
            wire.send_bytes(bytes(PROBE_NBYTES) + TRAILER.pack(PROBE.generation, 0))
            assert wire.is_ended()

    with impostor(serve) as port, takes_at_most(2.0):
        assert node.link(port, 1, 10_000) == LLMStatusCode.LLM_LINK_FAILED
    assert "not the peer of the hand-shake" in caplog.text


# -- in answers to a pull --------------------------------------------------------------------------

DATA = make_array((SHAPE[2],), 3).tobytes()
GENERATION = 5


def cache_info(**changes: object) -> m.CacheInfo:
    info = m.CacheInfo(
        cache_id=1,
        kind=1,
        num_tensors=SHAPE[0],
        num_rows=SHAPE[1],
        row_nbytes=SHAPE[2],
        is_remote_accessible=True,
        is_owned=False,
        generation=GENERATION,
        word_addr=0x3000,
        addrs=np.array([0x10000, 0x20000], dtype="<u8").tobytes(),
        keys=b"",
    )
    for name, value in changes.items():
        setattr(info, name, value)
    return info


def honest(wire: Wire, request: m.AnyMessage) -> None:
    """Owns one blocks cache, whose blocks are all DATA."""
    if isinstance(request, m.Resolve):
        wire.send(m.Resolved(cache_info(), 0))
    else:
        assert isinstance(request, m.Read), request
        nbytes = len(request.columns) // 16 * SHAPE[2]
        wire.send(m.Sending(nbytes))
        wire.send_bytes(DATA * (nbytes // SHAPE[2]) + TRAILER.pack(GENERATION, 0))


def to_resolve(answer: Callable[[Wire], object]) -> Callable[[Wire, m.AnyMessage], None]:
    def act(wire: Wire, request: m.AnyMessage) -> None:
        answer(wire) if isinstance(request, m.Resolve) else honest(wire, request)

    return act


def to_read(answer: Callable[[Wire], object]) -> Callable[[Wire, m.AnyMessage], None]:
    def act(wire: Wire, request: m.AnyMessage) -> None:
        answer(wire) if isinstance(request, m.Read) else honest(wire, request)

    return act


def resolved(**changes: object) -> Callable[[Wire, m.AnyMessage], None]:
    return to_resolve(lambda wire: wire.send(m.Resolved(cache_info(**changes), 0)))


SENDING = m.encode(m.Sending(2 * SHAPE[2]))


LIES = {
    "garbage": (to_resolve(lambda wire: wire.send_bytes(b"GET / HTTP/1.1\r\n")), FAILED),
    "bad-text": (to_resolve(lambda wire: wire.send_bytes(BAD_TEXT)), FAILED),
    "huge-answer": (
        to_resolve(lambda wire: wire.send_bytes(m.HEADER.pack(m.MAGIC, 2**31))),
        FAILED,
    ),
    "wrong-type": (to_resolve(lambda wire: wire.send(m.Attached())), FAILED),
    "silence": (to_resolve(lambda wire: None), TIMEOUT),
    "half-an-answer": (to_resolve(lambda wire: wire.send_bytes(SENDING[:9])), TIMEOUT),
    "hangs-up": (to_resolve(Wire.hang_up), NOT_YET_LINK),
    "resets": (to_resolve(lambda wire: wire.hang_up(hard=True)), NOT_YET_LINK),
    "refused-with-success": (to_resolve(lambda wire: wire.send(m.Refused(0, "fine"))), FAILED),
    "refused-with-unknown": (to_resolve(lambda wire: wire.send(m.Refused(77, "?"))), FAILED),
    "missing-addresses": (resolved(addrs=b"\0" * 8), FAILED),
    "unknown-kind": (resolved(kind=9), FAILED),
    "larger-than-int64": (resolved(num_rows=2**40, row_nbytes=2**40), FAILED),
    "other-block-size": (resolved(row_nbytes=64), PARAM_INVALID),
    "too-few-blocks": (resolved(num_rows=1), PARAM_INVALID),
    "not-accessible": (resolved(is_remote_accessible=False), PARAM_INVALID),
    "sends-less": (to_read(lambda wire: wire.send(m.Sending(1))), FAILED),
    "sends-more": (to_read(lambda wire: wire.send(m.Sending(2**40))), FAILED),
    "sends-no-frame": (to_read(lambda wire: wire.send_bytes(DATA)), FAILED),
    "read-wrong-type": (to_read(lambda wire: wire.send(m.Linked("tcp"))), FAILED),
    "read-silence": (to_read(lambda wire: wire.send_bytes(SENDING)), TIMEOUT),
    "half-of-the-data": (to_read(lambda wire: wire.send_bytes(SENDING + DATA)), TIMEOUT),
    "no-trailer": (to_read(lambda wire: wire.send_bytes(SENDING + DATA + DATA)), TIMEOUT),
    "hangs-up-in-data": (to_read(lambda wire: wire.hang_up(SENDING, DATA)), NOT_YET_LINK),
    "other-generation": (
        to_read(lambda wire: wire.send_bytes(SENDING + DATA + DATA + TRAILER.pack(6, 0))),
        NOT_EXIST,
    ),
    "unmapped": (
        to_read(lambda wire: wire.send_bytes(SENDING + DATA + DATA + TRAILER.pack(5, 0x10000))),
        PARAM_INVALID,
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_an_error_in_time_and_hurts_nothing_else(node: Node, lie: str) -> None:
    tell, expected_status = LIES[lie]
    lies_left = [3]  # as often as a pull looks a cache up anew

    def answer(wire: Wire, request: m.AnyMessage) -> None:
        (tell if lies_left[0] else honest)(wire, request)

    node.start(LLMRole.DECODER, 2, transfer_path="tcp", sync_kv_timeout=SYNC_TIMEOUT_MS)
    cache = node.blocks_cache(*SHAPE, seed=1)
    array = node.arrays[cache.cache_id]
    untouched = array[:, [0, 1, 3]].copy()
    with impostor(owner(answer)) as port:
        assert node.link(port, 1) == SUCCESS
        with takes_at_most(budget_s(SYNC_TIMEOUT_MS)), pytest.raises(LLMException) as error:
            node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, [3], [2])
        assert error.value.status_code == expected_status
        assert np.array_equal(array[:, [0, 1, 3]], untouched)
        lies_left[0] = 0
        node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, [3], [2])
        assert array[0, 2].tobytes() == array[1, 2].tobytes() == DATA
        assert np.array_equal(array[:, [0, 1, 3]], untouched)
        assert [link.cluster_id for link in node.datadist.links()] == [1]


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"\0" * 64, id="zeros"),
        pytest.param(m.HEADER.pack(m.MAGIC, 2**32 - 1), id="huge-length"),
        pytest.param(BAD_TEXT, id="bad-text"),
        pytest.param(m.encode(WELCOME), id="wrong-type"),
        pytest.param(m.encode(m.Refused(0, "")), id="refused"),
        pytest.param(m.encode(m.ByeDone()), id="bye-done-unasked"),
    ],
)
def test_a_control_connection_that_carries_nonsense_ends_the_link(node: Node, said: bytes) -> None:
    node.start(LLMRole.DECODER, 2, transfer_path="tcp")
    controls: list[Wire] = []

    def serve(wire: Wire) -> None:
        controls.append(wire)
        owner(honest)(wire)

    with impostor(serve) as port:
        assert node.link(port, 1) == SUCCESS
        controls[0].send_bytes(said)
        assert eventually(lambda: node.datadist.links() == [])
        with pytest.raises(LLMException) as error:
            node.manager.pull_blocks(BlocksCacheKey(1, 0), node.blocks_cache(), [0], [0])
        assert error.value.status_code == NOT_YET_LINK
        assert node.link(port, 1) == SUCCESS


def test_a_flood_of_requests_to_dial_back_leaves_room_for_others(
    node: Node, peer: NodeProcess
) -> None:
    peer_port = peer.call(Node.start, LLMRole.PROMPT, 3, listen_ip_info="127.0.0.1:0")
    node.start(LLMRole.DECODER, 2, transfer_path="tcp")
    controls: list[Wire] = []

    def serve(wire: Wire) -> None:
        controls.append(wire)
        owner(honest)(wire)

    with impostor(serve) as port:
        assert node.link(port, 1) == SUCCESS
        before = descriptors()
        for _ in range(100):
            controls[0].send(m.DialBack(64))
        with takes_at_most(2.0):
            assert node.link(peer_port, 3) == SUCCESS
        assert descriptors() - before < 1000


@pytest.mark.shows("O27", "unlink.waits")
def test_links_that_wait_for_their_transfers_to_end_hold_up_nobody(
    node: Node, peer: NodeProcess
) -> None:
    """More of them are being unlinked than an engine has threads to answer with."""
    settings: dict[str, Any] = {"transfer_path": "tcp", "sync_kv_timeout": 10_000}
    my_port = node.start(LLMRole.MIX, 2, listen_ip_info="127.0.0.1:0", **settings)
    node.blocks_cache(2, 8, 1 << 19, seed=1, key=BlocksCacheKey(0, 0))
    peer.call(Node.start, LLMRole.DECODER, 3, **settings)
    assert peer.call(Node.link, my_port, 2) == SUCCESS
    asked: list[Wire] = []

    def never(wire: Wire, request: m.AnyMessage) -> None:
        asked.append(wire)

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(41))
        ports = [
            stack.enter_context(impostor(owner(never, index.to_bytes(16, "big"))))
            for index in range(20)
        ]
        pulling = []
        for port in ports:  # a pull takes the newest link to its cluster
            assert node.link(port, 1) == SUCCESS
            pulling.append(pool.submit(pull_nothing, node))
            assert eventually(lambda: len(asked) == len(pulling))
        unlinking = pool.submit(
            node.datadist.unlink_clusters, [cluster_info(port, 1) for port in ports], 1500
        )
        for _ in range(3):
            with takes_at_most(1.0):
                assert peer.call(pulls_all, 2)
        assert unlinking.result(10)[1] == [TIMEOUT] * 20
        node.datadist.unlink_clusters([cluster_info(port, 1) for port in ports], force=True)
        assert {call.result(10) for call in pulling} == {NOT_YET_LINK}


def pull_nothing(node: Node) -> LLMStatusCode:
    cache = node.blocks_cache(*SHAPE)
    with pytest.raises(LLMException) as error:
        node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, [0], [0])
    return error.value.status_code


def pulls_all(node: Node, cluster_id: int) -> bool:
    cache = node.blocks_cache(2, 8, 1 << 19)
    blocks = list(range(8))
    node.manager.pull_blocks(BlocksCacheKey(cluster_id, 0), cache, blocks, blocks)
    return np.array_equal(node.arrays[cache.cache_id], make_array((2, 8, 1 << 19), 1))
