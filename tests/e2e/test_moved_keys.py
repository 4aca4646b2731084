"""A key that leads elsewhere by now is followed, although its first way is remembered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import linked_pair
import numpy as np
import pytest
from linked_pair import GONE, status_of

from llm_datadist import BlocksCacheKey, LLMException
from llm_datadist.testing.cluster import make_array

if TYPE_CHECKING:
    from linked_pair import Pair

    from llm_datadist.testing.cluster import Bytes

pair = linked_pair.pair

KEY = BlocksCacheKey(1, 0)
SHAPE = (2, 6, 64)


def pulled(pair: Pair, block: int, shape: tuple[int, int, int] = SHAPE) -> Bytes:
    cache = pair.node.blocks_cache(*shape)
    pair.node.manager.pull_blocks(KEY, cache, [block], [0])
    return pair.node.arrays[cache.cache_id][:, 0]


@pytest.mark.shows("keys.blocks_overwrite", "generations")
def test_a_key_that_was_bound_anew_leads_to_the_new_cache(pair: Pair) -> None:
    pair.peer.call(linked_pair.add_blocks, *SHAPE, seed=1, key=KEY)
    for block in (0, 1):
        np.testing.assert_array_equal(pulled(pair, block), make_array(SHAPE, 1)[:, block])
    pair.peer.call(linked_pair.add_blocks, *SHAPE, seed=2, key=KEY)  # the old cache still lives
    np.testing.assert_array_equal(pulled(pair, 2), make_array(SHAPE, 2)[:, 2])


def test_a_key_that_was_bound_to_other_blocks_is_looked_up_again(pair: Pair) -> None:
    pair.peer.call(linked_pair.add_blocks, *SHAPE, seed=1, key=KEY)
    pulled(pair, 0)
    other = (2, 6, 128)
    pair.peer.call(linked_pair.add_blocks, *other, seed=2, key=KEY)
    np.testing.assert_array_equal(pulled(pair, 3, other), make_array(other, 2)[:, 3])


def test_a_key_whose_cache_has_gone_is_an_error(pair: Pair) -> None:
    cache_id = pair.peer.call(linked_pair.add_blocks, *SHAPE, seed=1, key=KEY)
    pulled(pair, 0)
    pair.peer.call(linked_pair.unregister, cache_id)
    with pytest.raises(LLMException) as error:
        pulled(pair, 0)
    assert status_of(error) == GONE
    pair.peer.call(linked_pair.add_blocks, *SHAPE, seed=3, key=KEY)
    np.testing.assert_array_equal(pulled(pair, 1), make_array(SHAPE, 3)[:, 1])
