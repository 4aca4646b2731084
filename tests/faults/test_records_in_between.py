"""Under TLS, with records: who is in the middle alters what passes, and nothing of that arrives.

Between two real processes, over TCP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from record_middle import RecordMiddle

from certificates import Authority
from llm_datadist import BlocksCacheKey, LLMException, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess, make_array
from llm_datadist.testing.timing import takes_at_most
from llm_datadist.transport import ktls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from llm_datadist.cache import Cache

#: there links have no such records
pytestmark = pytest.mark.skipif(not ktls.why_not(), reason="the kernel seals: bed/inside/ktls.py")

SUCCESS = LLMStatusCode.LLM_SUCCESS
KEY = BlocksCacheKey(1, 0)
SHAPE = (4, 32, 32 * 1024)
SRC = list(range(0, 32, 2))
DST = SRC[::-1]
#: no frame is so long
LARGE_NBYTES = 64 * 1024


class OnLargeRecords:
    """Does something to the third record with bytes of a cache; what came before is at hand."""

    def __init__(self, alter: Callable[[bytes], bytes | None]) -> None:
        self._alter = alter
        self._count = 0

    def __call__(self, record: bytes) -> bytes | None:
        if len(record) < LARGE_NBYTES:
            return record
        self._count += 1
        return self._alter(record) if self._count >= 3 else record


def flip(at: int) -> Callable[[bytes], bytes]:
    def alter(record: bytes) -> bytes:
        data = bytearray(record)
        data[at] ^= 1
        return bytes(data)

    return alter


def swap() -> Callable[[bytes], bytes]:
    kept: list[bytes] = []

    def alter(record: bytes) -> bytes:
        kept.append(record)
        return b"" if len(kept) == 1 else record + kept.pop(0) if len(kept) == 2 else record

    return alter


def cut_off() -> Callable[[bytes], bytes | None]:
    seen: list[bytes] = []

    def alter(record: bytes) -> bytes | None:
        seen.append(record)
        return record[:-1] if len(seen) == 1 else None

    return alter


ALTERATIONS: dict[str, Callable[[], Callable[[bytes], bytes | None]]] = {
    "length": lambda: flip(1),
    "first byte": lambda: flip(4),
    "a byte": lambda: flip(70_000),
    "tag": lambda: flip(-1),
    "dropped": lambda: lambda _: b"",
    "repeated": lambda: lambda record: record + record,
    "swapped": swap,
    "cut off": cut_off,
}


@pytest.fixture
def middle(node: Node, peer: NodeProcess, tmp_path: Path) -> Iterator[RecordMiddle]:
    """In front of cluster 1, which cluster 2 here is linked to."""
    settings: dict[str, Any] = {
        "transfer_path": "tcp",
        "link_security": Authority().issue(tmp_path).option(),
        "sync_kv_timeout": 1000,
    }
    port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    peer.call(own)
    node.start(LLMRole.DECODER, 2, **settings)
    with RecordMiddle(port) as middle:
        assert node.link(middle.port, 1) == SUCCESS
        yield middle
        node.stop()


def own(node: Node) -> None:
    node.blocks_cache(*SHAPE, seed=1, key=KEY)


def is_right_or_untouched(node: Node, cache: Cache) -> bool:
    arrived = node.arrays[cache.cache_id]
    expected = np.zeros_like(arrived)
    expected[:, DST] = make_array(SHAPE, 1)[:, SRC]
    return bool(((arrived == expected) | (arrived == 0)).all())


@pytest.mark.parametrize("what", ALTERATIONS)
def test_what_was_altered_on_its_way_reaches_no_cache(
    node: Node, middle: RecordMiddle, what: str
) -> None:
    cache = node.blocks_cache(*SHAPE)
    middle.alter_record = OnLargeRecords(ALTERATIONS[what]())
    with takes_at_most(2.0), pytest.raises(LLMException, match="the peer"):
        node.manager.pull_blocks(KEY, cache, SRC, DST)
    assert is_right_or_untouched(node, cache)
    middle.alter_record = lambda record: record
    node.manager.pull_blocks(KEY, cache, SRC, DST)
    arrived = node.arrays[cache.cache_id]
    np.testing.assert_array_equal(arrived[:, DST], make_array(SHAPE, 1)[:, SRC])


def test_records_of_before_are_of_no_use(node: Node, middle: RecordMiddle) -> None:
    """The same question, and the answer that was given to it the first time."""
    cache = node.blocks_cache(*SHAPE)
    before: list[bytes] = []

    def keep(record: bytes) -> bytes:
        if len(record) >= LARGE_NBYTES:
            before.append(record)
        return record

    middle.alter_record = keep
    node.manager.pull_blocks(KEY, cache, SRC, DST)
    answers = iter(before)
    middle.alter_record = lambda record: next(answers) if len(record) >= LARGE_NBYTES else record
    node.arrays[cache.cache_id][:] = 0
    with pytest.raises(LLMException, match="somebody is in between"):
        node.manager.pull_blocks(KEY, cache, SRC, DST)
    assert not node.arrays[cache.cache_id].any()
