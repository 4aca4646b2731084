"""Layer-wise transfers without lists of blocks, from and into blocks caches. Spec 6.12.

As the reference's layer-wise sample calls it: a blocks cache, at either end, is a row of one block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import linked_pair
import numpy as np
import pytest
from linked_pair import GONE, INVALID, SUCCESS, Pair, add_blocks, add_rows

from llm_datadist import (
    BlocksCacheKey,
    CacheKeyByIdAndIndex,
    LayerSynchronizer,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist.testing.cluster import Node, addrs_of, make_array

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist import LLMStatusCode
    from llm_datadist.cache import Cache
    from llm_datadist.keys import AnyKey

SHAPE = (4, 8, 64)
KEY = BlocksCacheKey(1, 0)

pusher = linked_pair.pusher
two_sided = linked_pair.two_sided


class Ready(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


def addresses(node: Node, cache_id: int) -> list[int]:
    return addrs_of(node.arrays[cache_id])


def blocks_of(node: Node) -> Cache:
    return node.blocks_cache(*SHAPE, seed=1)


def rows_of(node: Node) -> Cache:
    return node.rows_cache(*SHAPE, seed=1)


def send(pair: Pair, source: Cache, key: AnyKey, src_row: int = 0) -> LLMStatusCode:
    """All layers, to a cache of the peer's."""
    config = TransferWithCacheKeyConfig(key, range(2), range(2), src_row)  # type: ignore[arg-type]
    task = pair.node.manager.transfer_cache_async(source, Ready(), [config])
    assert task.get_results(20000) == [task.synchronize()]
    return task.synchronize()


@pytest.mark.shows("cm.transfer.first_block")
@pytest.mark.parametrize("make", [blocks_of, rows_of])
@pytest.mark.parametrize("named_by", ["key", "id"])
def test_without_lists_a_blocks_cache_receives_its_first_block(
    pusher: Pair, make: Callable[[Node], Cache], named_by: str
) -> None:
    theirs = pusher.peer.call(add_blocks, *SHAPE, seed=2, key=KEY)
    key = KEY if named_by == "key" else CacheKeyByIdAndIndex(1, theirs)
    assert send(pusher, make(pusher.node), key) == SUCCESS
    expected = make_array(SHAPE, 2)
    expected[:, 0] = make_array(SHAPE, 1)[:, 0]
    assert np.array_equal(pusher.theirs(theirs), expected)


@pytest.mark.shows("cm.transfer.first_block")
def test_without_lists_the_first_block_goes_into_any_row(pusher: Pair) -> None:
    theirs = pusher.peer.call(add_rows, 4, 3, 80, seed=2)
    key = CacheKeyByIdAndIndex(1, theirs, 2)
    assert send(pusher, blocks_of(pusher.node), key) == SUCCESS
    expected = make_array((4, 3, 80), 2)
    expected[:, 2, :64] = make_array(SHAPE, 1)[:, 0]
    assert np.array_equal(pusher.theirs(theirs), expected)


@pytest.mark.shows("cm.transfer.first_block")
def test_without_lists_the_first_block_goes_to_addresses(two_sided: Pair) -> None:
    theirs = two_sided.peer.call(add_blocks, *SHAPE, seed=2)
    addrs = [addr + 3 * 64 for addr in two_sided.peer.call(addresses, theirs)]
    cache, manager = blocks_of(two_sided.node), two_sided.node.manager
    task = manager.transfer_cache_async(cache, Ready(), [TransferConfig(1, addrs)])
    assert task.synchronize(20000) == SUCCESS
    expected = make_array(SHAPE, 2)
    expected[:, 3] = make_array(SHAPE, 1)[:, 0]
    assert np.array_equal(two_sided.theirs(theirs), expected)


@pytest.mark.shows("cm.transfer.first_block")
@pytest.mark.parametrize("lists", [(), (None, [5], 64)], ids=["row", "cut into blocks"])
def test_a_blocks_cache_has_no_other_row_to_send(
    two_sided: Pair, lists: tuple[object, ...]
) -> None:
    theirs = two_sided.peer.call(add_blocks, *SHAPE, seed=2)
    addrs = two_sided.peer.call(addresses, theirs)
    cache, manager = blocks_of(two_sided.node), two_sided.node.manager
    for row in (1, 8, 2**32 - 1):
        configs = [TransferConfig(1, addrs, src_batch_index=row)]
        task = manager.transfer_cache_async(cache, Ready(), configs, *lists)  # type: ignore[arg-type]
        assert task.synchronize(20000) == INVALID
    assert np.array_equal(two_sided.theirs(theirs), make_array(SHAPE, 2))


@pytest.mark.shows("cm.transfer.first_block")
def test_a_first_block_that_does_not_fit_is_refused(pusher: Pair) -> None:
    theirs = pusher.peer.call(add_blocks, 4, 8, 63, seed=2, key=KEY)
    source = blocks_of(pusher.node)
    assert send(pusher, source, KEY) == INVALID
    assert send(pusher, source, CacheKeyByIdAndIndex(1, theirs, 1)) == GONE
    assert send(pusher, source, CacheKeyByIdAndIndex(1, theirs), src_row=1) == INVALID
    assert np.array_equal(pusher.theirs(theirs), make_array((4, 8, 63), 2))
