"""A linked peer whose table is as long as an answer may be. Promises 3 and 6.

It costs the call that asked its own time, and the process's other threads and links nothing.
"""

from __future__ import annotations

import gc
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from wire import Wire, impostor, owner

from llm_datadist import BlocksCacheKey, LLMException, LLMRole, LLMStatusCode
from llm_datadist.core import messages as m
from llm_datadist.core.packed import pack_layers
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from typing_extensions import Self

    from llm_datadist.testing.cluster import Node

TIMEOUT_MS = 500
#: two busy cores may keep a thread waiting for some of it; decoding is one step of the interpreter
MOST_S = 1.0


def cache(number: int, keys: bytes = b"", layout: m.LayoutInfo | None = None) -> m.CacheInfo:
    return m.CacheInfo(
        cache_id=number, kind=1, num_tensors=0, num_rows=0, row_nbytes=0,
        is_remote_accessible=True, is_owned=False, generation=7, word_addr=4096, addrs=b"",
        keys=keys, layout=layout,
    )  # fmt: skip


def keyed(number: int) -> m.CacheInfo:
    ids = np.arange(m.MAX_KEYS, dtype="<u8") + number * m.MAX_KEYS
    return cache(number, np.concatenate([ids, np.zeros(3 * m.MAX_KEYS, "<u8")]).tobytes())


def layered(number: int) -> m.CacheInfo:
    names = pack_layers(range(m.MAX_LAYERS))
    layout = m.LayoutInfo(names, (0, 1, 1), 1, 1, 1, 2, "LKBND", [2, 1, 0, 0, 0])
    one = cache(number, layout=layout)
    one.num_tensors, one.num_rows, one.row_nbytes = 1, 1, 2**20
    one.addrs = (2**20).to_bytes(8, "little")
    return one


def frame_of(kind: str) -> bytes:
    make, most = {
        "keys": (keyed, 7),
        "layers": (layered, 1300),
        "caches": (cache, m.MAX_CACHES),
        "too many caches": (cache, 300_000),
    }[kind]
    frame = m.encode(m.Caches([make(number) for number in range(1, most + 1)]))
    assert len(frame) < m.MAX_BODY_NBYTES
    return frame


class Clock:
    """A thread that looks at the time as often as it may."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _look(self) -> None:
        seen_at = time.monotonic()
        while not self._is_over.wait(0.005):
            now = time.monotonic()
            self.longest_s, seen_at = max(self.longest_s, now - seen_at), now


@pytest.mark.parametrize("kind", ["keys", "layers", "caches", "too many caches"])
def test_a_long_table_takes_no_longer_than_the_call_and_stops_nobody(node: Node, kind: str) -> None:
    frame = frame_of(kind)

    def answer(wire: Wire, request: m.AnyMessage) -> None:
        if isinstance(request, m.ListCaches):
            wire.send_bytes(frame)
        else:
            wire.send(m.Refused(LLMStatusCode.LLM_KV_CACHE_NOT_EXIST, "no such key"))

    node.start(
        LLMRole.DECODER, 2, enable_remote_cache_accessible=True, sync_kv_timeout=TIMEOUT_MS,
        transfer_path="tcp",
    )  # fmt: skip
    mine = node.blocks_cache()
    gc.collect()
    with impostor(owner(answer)) as port:
        assert node.link(port, 1) == LLMStatusCode.LLM_SUCCESS
        for _ in range(2):
            with (
                Clock() as clock,
                takes_at_most(1.2 * TIMEOUT_MS / 1000 + MOST_S),
                pytest.raises(LLMException),
            ):
                node.manager.pull_blocks(BlocksCacheKey(1), mine, [0], [0])
            assert clock.longest_s < MOST_S


def test_a_link_that_is_cut_ends_the_reading_of_its_table(node: Node) -> None:
    frame = frame_of("layers")
    has_asked = threading.Event()

    def answer(wire: Wire, request: m.AnyMessage) -> None:
        wire.send_bytes(frame)
        has_asked.set()

    node.start(
        LLMRole.DECODER, 2, enable_remote_cache_accessible=True, sync_kv_timeout=60_000,
        transfer_path="tcp",
    )  # fmt: skip
    mine, failures = node.blocks_cache(), list[LLMStatusCode]()

    def pull() -> None:
        try:
            node.manager.pull_blocks(BlocksCacheKey(1), mine, [0], [0])
        except LLMException as error:
            failures.append(error.status_code)

    with impostor(owner(answer)) as port:
        assert node.link(port, 1) == LLMStatusCode.LLM_SUCCESS
        pulling = threading.Thread(target=pull)
        pulling.start()
        assert has_asked.wait(10)
        with takes_at_most(1.0):
            node.unlink(port, 1, 1000, force=True)
            pulling.join()
    assert failures == [LLMStatusCode.LLM_NOT_YET_LINK]
