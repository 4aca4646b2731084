"""What transfer_cache_async refuses at once, before its thread begins. Spec 6.12."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from linked_pair import INVALID, NOT_LINKED

from llm_datadist import (
    CacheKeyByIdAndIndex,
    LayerSynchronizer,
    LLMException,
    LLMRole,
    Placement,
    TransferConfig,
    TransferWithCacheKeyConfig,
)

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node

KEY = CacheKeyByIdAndIndex(1, 1)
TO_KEY = TransferWithCacheKeyConfig(KEY, range(3), range(3))


class EveryLayer(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


@pytest.fixture
def alone(node: Node) -> Node:
    """In two-sided mode: destinations are addresses."""
    node.start(LLMRole.PROMPT, 2)
    return node


def to_addresses(num_addrs: int = 6, *args: Any) -> TransferConfig:
    return TransferConfig(1, [65536] * num_addrs, *args)


def refused(node: Node, **arguments: Any) -> tuple[type[Exception], object]:
    """The error of a transfer of the six-tensor cache in `src_cache` ("rows" or "blocks")."""
    caches = {"rows": node.rows_cache(6, 4, 64), "blocks": node.blocks_cache(6, 4, 64)}
    caches["host"] = node.rows_cache(6, 4, 64, placement=Placement.HOST)
    named = arguments.pop("src_cache", "rows")
    defaults: dict[str, Any] = {
        "layer_synchronizer": EveryLayer(),
        "transfer_configs": [to_addresses()],
    }
    threads = [thread.name for thread in threading.enumerate()]
    with pytest.raises((TypeError, ValueError, LLMException)) as error:
        node.manager.transfer_cache_async(caches.get(named, named), **(defaults | arguments))
    assert [thread.name for thread in threading.enumerate()] == threads
    return type(error.value), getattr(error.value, "status_code", None)


@pytest.mark.shows("error.57")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"src_cache": None}, TypeError),
        ({"src_cache": 1}, TypeError),
        ({"dst_block_indices": 1}, TypeError),
        ({"dst_block_indices": ["1"]}, TypeError),
        ({"dst_block_indices": np.array([1])}, TypeError),
        ({"dst_block_indices": [-1]}, ValueError),
        ({"dst_block_indices": [2**64]}, ValueError),
        ({"src_block_indices": {1}}, TypeError),
        ({"src_block_indices": [1.0]}, TypeError),
        ({"src_block_indices": [-1]}, ValueError),
        ({"dst_block_memory_size": "16"}, TypeError),
        ({"dst_block_memory_size": -1}, ValueError),
        ({"dst_block_memory_size": 2**64}, ValueError),
        ({"layer_synchronizer": None}, TypeError),
        ({"layer_synchronizer": print}, TypeError),
        ({"transfer_configs": None}, TypeError),
        ({"transfer_configs": to_addresses()}, TypeError),
        ({"transfer_configs": [1]}, TypeError),
        ({"transfer_configs": [TO_KEY]}, TypeError),
    ],
    ids=str,
)
def test_wrong_types_and_numbers(
    alone: Node, arguments: dict[str, Any], expected: type[Exception]
) -> None:
    assert refused(alone, **arguments) == (expected, None)


@pytest.mark.shows("error.57")
@pytest.mark.parametrize(
    "arguments",
    [
        {"src_cache": "host"},
        {"src_cache": "blocks", "src_block_indices": [1]},  # from blocks to a cache
        {"src_cache": "blocks", "src_block_indices": [1], "dst_block_indices": [1, 2]},
        {"dst_block_indices": [1]},  # of which size?
        {"dst_block_memory_size": 16},  # of which blocks?
        {"dst_block_memory_size": 1, "dst_block_indices": []},
        {"transfer_configs": [to_addresses(6, range(4))]},
        {"transfer_configs": [to_addresses(2, range(3, 4))]},
        {"transfer_configs": [to_addresses(5)]},
        {"transfer_configs": [to_addresses(6, range(2))]},
        {"transfer_configs": [to_addresses(6, None, 4)]},
        {"transfer_configs": [to_addresses(), to_addresses(0)]},
        {
            "src_cache": "blocks",
            "src_block_indices": [1],
            "dst_block_indices": [1],
            "transfer_configs": [to_addresses(6, None, 1)],
        },
    ],
    ids=str,
)
def test_arguments_that_do_not_go_together(alone: Node, arguments: dict[str, Any]) -> None:
    assert refused(alone, **arguments) == (LLMException, INVALID)


@pytest.mark.shows("error.57")
def test_with_remote_access_destinations_are_keys(node: Node) -> None:
    node.start(LLMRole.PROMPT, 2, enable_remote_cache_accessible=True)
    assert refused(node, transfer_configs=[to_addresses()]) == (TypeError, None)
    assert refused(node, transfer_configs=[TO_KEY, to_addresses()]) == (TypeError, None)
    too_far = TransferWithCacheKeyConfig(KEY, range(4), range(4))
    assert refused(node, transfer_configs=[too_far]) == (LLMException, INVALID)
    uneven = TransferWithCacheKeyConfig(KEY, range(3), range(3))
    uneven.dst_layer_range = range(2)
    assert refused(node, transfer_configs=[uneven]) == (LLMException, INVALID)


@pytest.mark.shows("error.57", "error.46")
def test_a_missing_range_is_written_into_the_config(alone: Node) -> None:
    config = to_addresses()
    cache = alone.rows_cache(6, 4, 64)
    task = alone.manager.transfer_cache_async(cache, EveryLayer(), (config,), None, (), 0)
    assert config.src_layer_range == range(3)
    assert task.synchronize(20000) == NOT_LINKED
