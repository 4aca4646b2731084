"""How many TCP connections a transfer uses: by its size, the cores, or as it is set."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import make_array
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.testing.cluster import Node, NodeProcess

MIB = 1 << 20
THREADS_OF_PEER = 3
SHAPE = (4, 16, 128 * 1024)
#: enough to open streams, and for 8 MiB some minutes
CRAWL_NBYTES_PER_S = 50_000
#: of a link: its control connection, and the stream over which its listener verified the path
OTHERS = 2


@pytest.fixture
def proxy(peer: NodeProcess) -> Iterator[FaultProxy]:
    """In front of another process that has something to pull."""
    port = peer.call(start, 1, "127.0.0.1:0", {"transfer_threads": THREADS_OF_PEER})
    with FaultProxy(port) as proxy:
        yield proxy


def start(node: Node, cluster_id: int, listen: str, settings: dict[str, object]) -> int:
    role = LLMRole.PROMPT if cluster_id == 1 else LLMRole.DECODER
    port = node.start(
        role,
        cluster_id,
        listen_ip_info=listen,
        transfer_path="tcp",
        enable_remote_cache_accessible=True,
        sync_kv_timeout=20_000,
        **settings,
    )
    node.blocks_cache(*SHAPE, seed=cluster_id, key=BlocksCacheKey(cluster_id, 0))
    return port


def pull(node: Node, cluster_id: int, nbytes: int) -> None:
    """So much of the cluster's cache, all of which arrives."""
    blocks = list(range(nbytes // (SHAPE[0] * SHAPE[2])))
    cache = node.blocks_cache(*SHAPE)
    node.manager.pull_blocks(BlocksCacheKey(cluster_id, 0), cache, blocks, blocks)
    array, expected = node.arrays[cache.cache_id], make_array(SHAPE, cluster_id)
    np.testing.assert_array_equal(array[:, blocks], expected[:, blocks])


def link(node: Node, proxy: FaultProxy, **settings: object) -> None:
    start(node, 2, "", settings)
    assert node.link(proxy.port, 1) == LLMStatusCode.LLM_SUCCESS


def num_streams(node: Node, proxy: FaultProxy, nbytes: int, expected: int) -> int:
    """That a link has after a pull of so many bytes.

    The network crawls until all that are expected have been opened: none does another one's part.
    """
    pull(node, 1, MIB // 2)  # which brings the owner's table
    proxy.slow(CRAWL_NBYTES_PER_S)
    with ThreadPoolExecutor(1) as thread:
        pulling = thread.submit(pull, node, 1, nbytes)
        eventually(lambda: proxy.num_connections - OTHERS >= expected)
        proxy.restore()
        pulling.result()
    return proxy.num_connections - OTHERS


@pytest.mark.parametrize(
    ("settings", "streams"),
    [
        ({"transfer_threads": 1}, 1),
        ({"transfer_threads": 2}, 2),
        ({"transfer_threads": 5}, 5),
        ({"ge_options": {"llm_datadist.Threads": "3"}}, 3),
    ],
    ids=["one", "two", "five", "three-by-the-option"],
)
def test_a_large_transfer_uses_as_many_streams_as_are_set(
    node: Node, proxy: FaultProxy, settings: dict[str, object], streams: int
) -> None:
    link(node, proxy, **settings)
    assert num_streams(node, proxy, 8 * MIB, streams) == streams


def test_unset_it_uses_as_many_as_there_are_cores_and_at_most_four(
    node: Node, proxy: FaultProxy
) -> None:
    link(node, proxy)
    most = min(len(os.sched_getaffinity(0)), 4)
    assert num_streams(node, proxy, 8 * MIB, most) == most


@pytest.mark.parametrize(("nbytes", "streams"), [(MIB // 2, 1), (MIB, 1), (3 * MIB, 3)])
def test_a_small_transfer_uses_fewer_than_are_set(
    node: Node, proxy: FaultProxy, nbytes: int, streams: int
) -> None:
    """A stream for less than 1 MiB would cost more than it saves."""
    link(node, proxy, transfer_threads=5)
    assert num_streams(node, proxy, nbytes, streams) == streams


def test_streams_are_kept_for_what_follows(node: Node, proxy: FaultProxy) -> None:
    link(node, proxy, transfer_threads=3)
    assert num_streams(node, proxy, 8 * MIB, 3) == 3
    for _ in range(2):
        pull(node, 1, 8 * MIB)
    assert proxy.num_connections - OTHERS == 3


def test_the_end_that_listens_has_streams_of_its_own_and_the_caller_dials_them(
    node: Node, peer: NodeProcess, proxy: FaultProxy
) -> None:
    link(node, proxy, transfer_threads=1)
    assert num_streams(node, proxy, MIB, 1) == 1
    all_streams = THREADS_OF_PEER - 1 + 1  # one of the peer's is among `OTHERS`; and one is ours

    def has_all() -> bool:  # at last: a part may be done before all helpers have woken up
        peer.call(pull, 2, 8 * MIB)
        return proxy.num_connections - OTHERS == all_streams

    assert eventually(has_all, within_s=20)
    assert has_all()
