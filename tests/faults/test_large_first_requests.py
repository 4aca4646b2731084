"""The peer of a link may ask for much at once, right behind the word that its stream has joined."""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, Any

import pytest
from keyed_wire import BY_SECRET, KeyedWire
from wire import NONCE, PATIENCE_S, PROBE, TRAILER, Wire, columns, impostor

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.core import messages as m
from llm_datadist.transport.base import PROBE_NBYTES

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node

SETTINGS: dict[str, Any] = {"transfer_path": "tcp", "enable_remote_cache_accessible": True}
#: more than a frame may have before a link exists
SEGMENTS = m.MAX_GREETING_NBYTES // 16 + 1


@pytest.mark.parametrize("security", [None, BY_SECRET], ids=["open", "secret"])
def test_a_large_request_may_come_with_the_word_that_the_stream_has_joined(
    node: Node, security: str | None
) -> None:
    """The owner of a push's destination asks so, where it was called: the kernel joins both."""
    node.start(LLMRole.DECODER, 2, **SETTINGS, link_security=security)
    cache = node.blocks_cache(1, 1, 4096, key=BlocksCacheKey(2), seed=1)
    addr = node.arrays[cache.cache_id].ctypes.data
    answers: queue.Queue[m.AnyMessage] = queue.Queue()

    def serve(wire: Wire) -> None:
        wire = KeyedWire(wire.socket, is_caller=False) if security else wire
        first = wire.receive()
        if isinstance(first, m.Hello):
            wire.send(m.Welcome(m.PROTOCOL_VERSION, 1, NONCE, NONCE, {"tcp": b""}, PROBE))
            wire.expect(m.Ready)
            wire.send(m.Linked("tcp"))
            wire.send(m.DialBack(1))
            wire.is_ended()
        elif isinstance(first, m.Attach) and first.is_reverse:
            parts = m.Attached(), m.Read(cache.cache_id, 1, 1000, columns([(addr, 1)] * SEGMENTS))
            frames = list(map(m.encode, parts))
            wire.send_bytes(b"".join(map(wire.shield.seal, frames) if security else frames))  # type: ignore[attr-defined]
            answers.put(wire.receive())
            wire.is_ended()
        else:
            wire.send(m.Attached())
            wire.expect(m.Read)
            wire.send(m.Sending(PROBE_NBYTES))
            wire.send_bytes(NONCE.ljust(PROBE_NBYTES) + TRAILER.pack(PROBE.generation, 0))
            wire.is_ended()

    with impostor(serve) as port:
        assert node.link(port, 1) == LLMStatusCode.LLM_SUCCESS
        answer = answers.get(timeout=PATIENCE_S)
        node.stop()
    # that it is another generation was looked up behind all of the request
    assert isinstance(answer, m.Refused)
    assert answer.status == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
