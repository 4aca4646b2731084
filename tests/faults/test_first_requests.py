"""A request that comes together with the last message of a stream's hand-shake."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from wire import NONCE, PROBE, TRAILER, Wire, columns, impostor

from llm_datadist import LLMRole, LLMStatusCode
from llm_datadist.core import messages as m
from llm_datadist.transport.base import PROBE_NBYTES

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node

#: a frame above what strangers may send
COUNT = 8000


def test_a_large_request_may_come_with_the_word_that_the_stream_is_there(node: Node) -> None:
    """It is the cap of a linked peer that counts, not that of the hand-shake."""
    said: list[m.Hello] = []
    answered = threading.Event()

    def serve(wire: Wire) -> None:
        first = wire.receive()
        if isinstance(first, m.Hello):
            said.append(first)
            wire.send(
                m.Welcome(m.PROTOCOL_VERSION, 1, b"an owner by hand", NONCE, {"tcp": b""}, PROBE)
            )
            wire.expect(m.Ready)
            wire.send(m.Linked("tcp"))
            wire.send(m.DialBack(1))
            wire.is_ended()
            return
        assert isinstance(first, m.Attach), first
        if not first.is_reverse:
            wire.send(m.Attached())
            wire.serve_probe()
            wire.is_ended()
            return
        probe = said[0].probe
        asked = m.Read(0, probe.generation, 10_000, columns([(probe.addr, 8)] * COUNT))
        wire.send_bytes(m.encode(m.Attached()) + m.encode(asked))
        assert wire.expect(m.Sending).nbytes == 8 * COUNT
        assert wire.receive_bytes(8 * COUNT) == probe.nonce[:8] * COUNT
        wire.receive_bytes(TRAILER.size)
        answered.set()

    assert 16 * COUNT > m.MAX_GREETING_NBYTES >= PROBE_NBYTES
    node.start(LLMRole.DECODER, 2, transfer_path="tcp")
    with impostor(serve) as port:
        assert node.link(port, 1) is LLMStatusCode.LLM_SUCCESS
        assert answered.wait(10)
