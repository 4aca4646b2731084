"""Who said Hello and is not linked yet reads nothing, is seen in the stats, and costs little."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from keyed_wire import BY_SECRET, HEAD_NBYTES, KeyedWire
from wire import NONCE, PROBE, Wire, columns, hello, impostor

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.core import messages as m
from llm_datadist.testing.cluster import Node, NodeProcess, addrs_of
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.core.stats import ClusterStats

SUCCESS = LLMStatusCode.LLM_SUCCESS
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK
SHAPE = (2, 4, 4096)
SETTINGS: dict[str, Any] = {"transfer_path": "tcp", "enable_remote_cache_accessible": True}
SOON_S = 2.0
#: docs/security.md: of one address, and how long at most
MOST_HAND_SHAKES = 128
HAND_SHAKE_S = 60.0
ASKED_FOR_S = 10.0


def start(process: NodeProcess, **more: Any) -> tuple[int, int, int, int]:
    """An owner of one cache; its port, and the cache's id, generation and first address."""
    port = process.call(
        Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **SETTINGS, **more
    )
    return port, *process.call(own)


def own(node: Node) -> tuple[int, int, int]:
    cache = node.blocks_cache(*SHAPE, seed=1, key=BlocksCacheKey(0, 0))
    return cache.cache_id, 0, addrs_of(node.arrays[cache.cache_id])[0]


def stats(node: Node) -> ClusterStats:
    return node.datadist.stats()


def attach(stack: ExitStack, port: int, token: bytes) -> Wire:
    wire = stack.enter_context(Wire.dial(port))
    wire.send(m.Attach(token, False))
    wire.expect(m.Attached)
    return wire


QUESTIONS: list[Callable[[int, int], m.Message]] = [
    lambda cache_id, addr: m.ListCaches(),
    lambda cache_id, addr: m.Resolve(cache_id, 0, 0, False),
    lambda cache_id, addr: m.Resolve(None, 2**64 - 1, 0, False),
    lambda cache_id, addr: m.Read(cache_id, 1, 1000, columns([(addr, 8)])),
    lambda cache_id, addr: m.Digest(cache_id, 1, 1000, columns([(addr, 8)])),
    lambda cache_id, addr: m.Digest(0, PROBE.generation, 1000, columns([(addr, 8)])),
    lambda cache_id, addr: m.UseUp(cache_id, 0, 0, 0),
    lambda cache_id, addr: m.Read(
        0, PROBE.generation, 1000, columns([(addr, 8)]), (2**64 - 1, 0, False, 0)
    ),
    lambda cache_id, addr: m.Fetch(cache_id, 1, 1, 1, 8, 1000, 1.0, bytes(24)),
]


def test_who_only_said_hello_reads_the_probe_and_nothing_else(victim: NodeProcess) -> None:
    port, cache_id, _, addr = start(victim)
    with ExitStack() as stack:
        control = stack.enter_context(Wire.dial(port))
        control.send(hello(is_remote_accessible=True))
        welcome = control.expect(m.Welcome)
        stream = attach(stack, port, welcome.token)
        for question in QUESTIONS:
            stream.send(question(cache_id, addr))
            assert stream.expect(m.Refused).status == NOT_YET_LINK
        probe = welcome.probe
        stream.send(m.Read(0, probe.generation, 1000, columns([(probe.addr, 16)])))
        assert stream.expect(m.Sending).nbytes == 16
        assert stream.receive_bytes(32)[:16] == probe.nonce
        stream.send(m.ListExports("tcp"))
        stream.expect(m.Exports)
        seen = victim.call(stats)
        assert (seen.num_links, seen.num_half_open) == (0, 1)
    assert eventually(lambda: victim.call(stats).num_half_open == 0)


def test_who_only_said_hello_has_few_streams_and_small_frames(victim: NodeProcess) -> None:
    port, *_ = start(victim)
    with ExitStack() as stack:
        control = stack.enter_context(Wire.dial(port))
        control.send(hello(is_remote_accessible=True))
        token = control.expect(m.Welcome).token
        streams = [attach(stack, port, token) for _ in range(2)]
        more = stack.enter_context(Wire.dial(port))
        more.send(m.Attach(token, False))
        more.expect(m.Refused)
        streams[0].send_bytes(m.HEADER.pack(m.MAGIC, m.MAX_GREETING_NBYTES + 1))
        assert streams[0].is_ended()


def test_who_has_the_secret_and_is_not_linked_has_small_frames(victim: NodeProcess) -> None:
    """Before its Hello, and in place of it."""
    port, *_ = start(victim, link_security=BY_SECRET)
    with KeyedWire.dial(port) as wire, takes_at_most(3.0):
        nbytes = m.HEADER.size + m.MAX_GREETING_NBYTES + 1
        wire.send_bytes(nbytes.to_bytes(4, "little") + bytes(HEAD_NBYTES - 4))
        assert wire.is_ended()


def test_a_crowd_of_hand_shakes_keeps_nobody_from_linking(node: Node, victim: NodeProcess) -> None:
    port, *_ = start(victim)
    node.start(LLMRole.DECODER, 2, **SETTINGS)
    with ExitStack() as stack:
        wires = []
        for index in range(2 * MOST_HAND_SHAKES):
            wires.append(stack.enter_context(Wire.dial(port)))
            greeting = hello(
                instance=index.to_bytes(16, "big"), timeout_ms=int(ASKED_FOR_S * 1000),
                is_remote_accessible=True,
            )  # fmt: skip
            wires[-1].send(greeting)
            wires[-1].expect(m.Welcome)
            wires[-1].send(m.Ready("tcp"))  # the owner verifies, in a thread
        begun = time.monotonic()
        assert wires[0].is_ended(), "the oldest made room"
        seen = victim.call(stats)
        assert 0 < seen.num_half_open <= MOST_HAND_SHAKES
        assert seen.num_turned_away >= MOST_HAND_SHAKES
        with takes_at_most(SOON_S):
            assert node.link(port, 1) == SUCCESS
            cache, blocks = node.blocks_cache(*SHAPE), list(range(SHAPE[1]))
            node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, blocks, blocks)
        assert wires[-1].is_ended()
        assert time.monotonic() - begun < 1.2 * ASKED_FOR_S, "it has as long as its caller said"


@pytest.mark.long
def test_who_would_shake_hands_for_an_hour_has_a_minute(victim: NodeProcess) -> None:
    port, *_ = start(victim)
    with Wire.dial(port) as wire, takes_at_most(1.2 * HAND_SHAKE_S):
        wire.socket.settimeout(1.2 * HAND_SHAKE_S)
        wire.send(hello(timeout_ms=3_600_000, is_remote_accessible=True))
        wire.expect(m.Welcome)
        assert wire.is_ended()


# -- at the end that called --


@pytest.mark.parametrize("is_linked", [True, False])
def test_a_request_ahead_of_the_word_that_the_link_is_made(node: Node, is_linked: bool) -> None:
    """The caller puts it off for a moment: whoever was called may have made the link already."""
    said: list[m.AnyMessage] = []
    asked: list[Wire] = []

    def listen(wire: Wire) -> None:
        first = wire.receive()
        if isinstance(first, m.Attach):
            wire.send(m.Attached())
            if first.is_reverse:
                asked.append(wire)
                wire.send(m.ListCaches())
                said.append(wire.receive())
            else:
                wire.serve_probe()
            wire.is_ended()
            return
        wire.send(m.Welcome(m.PROTOCOL_VERSION, 1, bytes(16), NONCE, {"tcp": b""}, PROBE))
        wire.expect(m.Ready)
        wire.send(m.DialBack(1))
        assert eventually(lambda: bool(asked))
        if is_linked:
            wire.send(m.Linked("tcp"))
        assert eventually(lambda: bool(said))
        wire.send(m.Linked("tcp"))

    node.start(LLMRole.DECODER, 2, **SETTINGS)
    node.blocks_cache(*SHAPE)
    with impostor(listen) as port:
        node.link(port, 1)
        assert eventually(lambda: bool(said))
        if is_linked:
            assert isinstance(said[0], m.Caches)
            assert [info.cache_id for info in said[0].infos] == [1]
            assert np.frombuffer(said[0].infos[0].addrs, "<u8").tolist() == addrs_of(node.arrays[1])
        else:
            assert isinstance(said[0], m.Refused)
            assert said[0].status == NOT_YET_LINK
