"""What pulls and pushes refuse before they look for a link. Spec 6.9 to 6.11, 10."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pytest
from linked_pair import GONE, INVALID, NO_ID, NOT_LINKED, SUCCESS

from llm_datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    LayerSynchronizer,
    LLMException,
    LLMRole,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.testing.cluster import Node

Result: TypeAlias = LLMStatusCode | type[Exception]

ROW = CacheKeyByIdAndIndex(1, 1)
BLOCKS = BlocksCacheKey(1, 0)
NUM_TENSORS = 6
ROW_NBYTES = 64


def result_of(call: Callable[..., object], **arguments: Any) -> Result:
    try:
        call(**arguments)
    except LLMException as error:
        return error.status_code
    except (TypeError, ValueError, AttributeError) as error:
        return type(error)
    return SUCCESS


@pytest.fixture
def alone(node: Node, is_accessible: bool) -> Node:
    node.start(LLMRole.DECODER, 2, enable_remote_cache_accessible=is_accessible)
    return node


@pytest.fixture
def lone_pusher(node: Node) -> Node:
    node.start(LLMRole.PROMPT, 2, enable_remote_cache_accessible=True)
    return node


LAYERS: list[tuple[dict[str, Any], Result]] = [
    ({"tensor_num_per_layer": -1}, ValueError),
    ({"tensor_num_per_layer": 2**32}, ValueError),
    ({"tensor_num_per_layer": 1.0}, TypeError),
    ({"tensor_num_per_layer": "x"}, TypeError),
    ({"tensor_num_per_layer": 0}, INVALID),
    ({"tensor_num_per_layer": 4, "src_layer_range": range(1)}, INVALID),
    ({"tensor_num_per_layer": 4, "dst_layer_range": range(1)}, INVALID),
    ({"src_layer_range": [0, 1]}, TypeError),
    ({"dst_layer_range": (0, 1)}, TypeError),
    ({"src_layer_range": 1}, TypeError),
    ({"src_layer_range": range(0, 2, 2)}, INVALID),
    ({"dst_layer_range": range(2, 0, -1)}, INVALID),
    ({"src_layer_range": range(-1, 1)}, INVALID),
    ({"dst_layer_range": range(-1, 1)}, INVALID),
    ({"src_layer_range": range(2**32, 2**32 + 1)}, ValueError),
    ({"dst_layer_range": range(2**32)}, ValueError),
]
#: those that only a pull refuses before the link is needed
PULLED_LAYERS: list[tuple[dict[str, Any], Result]] = [
    ({"dst_layer_range": range(4)}, INVALID),
    ({"src_layer_range": range(1), "dst_layer_range": range(2)}, INVALID),
    ({"src_layer_range": range(2)}, INVALID),
]


@pytest.mark.shows("error.42", "error.45", "error.47", "error.48", "pull.order_of_errors")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"cache_key": None}, AttributeError),
        ({"cache_key": "1"}, TypeError),
        ({"cache_key": BLOCKS}, TypeError),
        ({"cache_key": CacheKeyByIdAndIndex(2, 1)}, INVALID),
        ({"cache": None}, AttributeError),
        ({"cache": 1}, TypeError),
        ({"cache": "blocks"}, INVALID),
        ({"cache": "lost"}, GONE),
        ({"batch_index": "0"}, TypeError),
        ({"batch_index": -1}, ValueError),
        ({"batch_index": 2**32}, ValueError),
        ({"batch_index": 4}, INVALID),
        ({"size": 1.0}, TypeError),
        ({"size": 2**63}, ValueError),
        ({"size": 0}, INVALID),
        ({"size": -2}, INVALID),
        ({"size": ROW_NBYTES + 1}, INVALID),
        ({}, NOT_LINKED),
        ({"size": ROW_NBYTES, "batch_index": 3, "tensor_num_per_layer": 9}, NOT_LINKED),
        ({"src_layer_range": range(2), "dst_layer_range": range(1, 3)}, NOT_LINKED),
    ],
    ids=str,
)
def test_a_pull_of_a_row_refuses(alone: Node, arguments: dict[str, Any], expected: Result) -> None:
    caches = {"blocks": alone.blocks_cache(), "lost": alone.rows_cache()}
    alone.manager.unregister_cache(caches["lost"].cache_id)
    rows = alone.rows_cache(NUM_TENSORS, 4, ROW_NBYTES)
    named = arguments.get("cache", rows)
    arguments = {"cache_key": ROW} | arguments | {"cache": caches.get(named, named)}
    assert result_of(alone.manager.pull_cache, **arguments) == expected
    assert not alone.arrays[rows.cache_id].any()


@pytest.mark.shows("error.53", "error.45", "error.47", "pull.block_lists", "pull.order_of_errors")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"src_cache_key": None}, AttributeError),
        ({"src_cache_key": 1}, TypeError),
        ({"src_cache_key": BlocksCacheKey(2, 0)}, INVALID),
        ({"src_cache_key": ROW}, INVALID),  # with src_blocks
        ({"src_cache_key": CacheKey(1, 7)}, INVALID),
        ({"dst_cache": None}, AttributeError),
        ({"dst_cache": [1]}, TypeError),
        ({"dst_cache": "rows"}, INVALID),
        ({"dst_cache": "lost"}, GONE),
        ({"src_blocks": None}, TypeError),
        ({"src_blocks": [0.0]}, TypeError),
        ({"src_blocks": np.array([0])}, TypeError),
        ({"dst_blocks": {0}}, TypeError),
        ({"dst_blocks": ["0"]}, TypeError),
        ({"dst_blocks": np.array([0])}, TypeError),
        ({"src_blocks": []}, INVALID),
        ({"src_blocks": [], "dst_blocks": []}, INVALID),
        ({"src_cache_key": ROW, "src_blocks": [], "dst_blocks": ()}, INVALID),
        ({"src_blocks": [0, 1]}, INVALID),
        ({"dst_blocks": [0, 1]}, INVALID),
        ({"dst_blocks": [8]}, INVALID),
        ({"dst_blocks": [-1]}, INVALID),
        ({}, NOT_LINKED),
        ({"src_blocks": (9,), "dst_blocks": (7,)}, NOT_LINKED),
        ({"src_cache_key": ROW, "src_blocks": ()}, NOT_LINKED),
        ({"src_cache_key": CacheKey(1, 7), "src_blocks": ()}, NOT_LINKED),
    ],
    ids=str,
)
def test_a_pull_of_blocks_refuses(alone: Node, arguments: dict[str, Any], expected: Result) -> None:
    caches = {"rows": alone.rows_cache(), "lost": alone.blocks_cache()}
    alone.manager.unregister_cache(caches["lost"].cache_id)
    blocks = alone.blocks_cache(NUM_TENSORS, 8, ROW_NBYTES)
    named = arguments.get("dst_cache", blocks)
    named = caches.get(named, named) if isinstance(named, str) else named
    defaults = {"src_cache_key": BLOCKS, "src_blocks": [0], "dst_blocks": [0]}
    arguments = defaults | arguments | {"dst_cache": named}
    assert result_of(alone.manager.pull_blocks, **arguments) == expected
    assert not alone.arrays[blocks.cache_id].any()


@pytest.mark.shows("error.43", "error.44", "pull.ranges", "pull.order_of_errors")
@pytest.mark.parametrize(("layers", "expected"), [*LAYERS, *PULLED_LAYERS], ids=str)
def test_layers_that_a_pull_cannot_have(
    alone: Node, layers: dict[str, Any], expected: Result
) -> None:
    rows, blocks = alone.rows_cache(NUM_TENSORS), alone.blocks_cache(NUM_TENSORS)
    pull_cache, pull_blocks = alone.manager.pull_cache, alone.manager.pull_blocks
    assert result_of(pull_cache, cache_key=ROW, cache=rows, **layers) == expected
    pulled: dict[str, Any] = {"src_cache_key": BLOCKS, "src_blocks": [0], "dst_blocks": [0]}
    assert result_of(pull_blocks, dst_cache=blocks, **pulled, **layers) == expected


@pytest.mark.shows("error.41", "error.40", "pull.order_of_errors")
@pytest.mark.parametrize(
    "key", [CacheKey(1, 7, prefix_id=8), CacheKey(1, NO_ID), CacheKey(1, NO_ID, 3)], ids=str
)
def test_a_key_has_one_id(alone: Node, is_accessible: bool, key: CacheKey) -> None:
    rows, blocks = alone.rows_cache(), alone.blocks_cache()
    by_row, by_block = alone.manager.pull_cache, alone.manager.pull_blocks
    expected: Result = TypeError if is_accessible else INVALID
    assert result_of(by_row, cache_key=key, cache=rows) == expected
    assert result_of(by_block, src_cache_key=key, dst_cache=blocks, dst_blocks=[0]) == INVALID


@pytest.mark.shows("error.40")
@pytest.mark.parametrize("key", [CacheKey(1, 7), CacheKey(1, NO_ID, prefix_id=8)], ids=str)
def test_with_remote_access_rows_are_pulled_by_id_alone(
    alone: Node, is_accessible: bool, key: CacheKey
) -> None:
    expected: Result = TypeError if is_accessible else NOT_LINKED
    pulled = {"cache_key": key, "cache": alone.rows_cache()}
    assert result_of(alone.manager.pull_cache, **pulled) == expected


@pytest.mark.shows("error.52", "error.46", "error.47", "error.48")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"dst_cache_key": None}, TypeError),
        ({"dst_cache_key": BLOCKS}, TypeError),
        ({"dst_cache_key": CacheKey(1, 7)}, TypeError),
        ({"src_cache": None}, TypeError),
        ({"src_cache": "blocks"}, INVALID),
        ({"src_cache": "lost"}, GONE),
        ({"src_batch_index": "0"}, TypeError),
        ({"src_batch_index": -1}, ValueError),
        ({"size": "-1"}, TypeError),
        ({"size": 2**63}, ValueError),
        ({"size": 0}, INVALID),
        ({"size": -2}, INVALID),
        ({"size": ROW_NBYTES}, INVALID),
        ({}, NOT_LINKED),
        ({"dst_cache_key": CacheKeyByIdAndIndex(2, 1)}, NOT_LINKED),  # there is none to ourselves
    ],
    ids=str,
)
def test_a_push_of_a_row_refuses(
    lone_pusher: Node, arguments: dict[str, Any], expected: Result
) -> None:
    caches = {"blocks": lone_pusher.blocks_cache(), "lost": lone_pusher.rows_cache()}
    lone_pusher.manager.unregister_cache(caches["lost"].cache_id)
    named = arguments.get("src_cache", lone_pusher.rows_cache(NUM_TENSORS, 4, ROW_NBYTES))
    arguments = {"dst_cache_key": ROW} | arguments | {"src_cache": caches.get(named, named)}
    assert result_of(lone_pusher.manager.push_cache, **arguments) == expected


@pytest.mark.shows("error.46", "error.47", "error.48")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"dst_cache_key": None}, TypeError),
        ({"dst_cache_key": ROW}, TypeError),
        ({"src_cache": None}, TypeError),
        ({"src_cache": "rows"}, INVALID),
        ({"src_cache": "lost"}, GONE),
        ({"src_blocks": np.array([0])}, TypeError),
        ({"dst_blocks": ["0"]}, TypeError),
        ({"src_blocks": []}, INVALID),
        ({"dst_blocks": []}, INVALID),
        ({"src_blocks": [], "dst_blocks": []}, INVALID),
        ({"src_blocks": [0, 1]}, INVALID),
        ({"src_blocks": [8]}, INVALID),
        ({"src_blocks": [-1]}, INVALID),
        ({}, NOT_LINKED),
    ],
    ids=str,
)
def test_a_push_of_blocks_refuses(
    lone_pusher: Node, arguments: dict[str, Any], expected: Result
) -> None:
    caches = {"rows": lone_pusher.rows_cache(), "lost": lone_pusher.blocks_cache()}
    lone_pusher.manager.unregister_cache(caches["lost"].cache_id)
    named = arguments.get("src_cache", lone_pusher.blocks_cache(NUM_TENSORS, 8, ROW_NBYTES))
    defaults = {"dst_cache_key": BLOCKS, "src_blocks": [0], "dst_blocks": [0]}
    arguments = defaults | arguments | {"src_cache": caches.get(named, named)}
    assert result_of(lone_pusher.manager.push_blocks, **arguments) == expected


@pytest.mark.shows("error.43", "error.44")
@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({"tensor_num_per_layer": -1}, ValueError),
        ({"tensor_num_per_layer": 1.0}, TypeError),
        ({"tensor_num_per_layer": 0}, INVALID),
        ({"src_layer_range": [0, 1]}, TypeError),
        ({"dst_layer_range": 1}, TypeError),
        ({"src_layer_range": range(0, 2, 2)}, INVALID),
        ({"dst_layer_range": range(-1, 1)}, INVALID),
        ({"src_layer_range": range(0)}, INVALID),  # unlike a pull's
        ({"dst_layer_range": range(2, 2)}, INVALID),
        ({"src_layer_range": range(2), "dst_layer_range": range(1)}, INVALID),
        ({"src_layer_range": range(2)}, INVALID),  # dst_layer_range is all three
        ({"dst_layer_range": range(4)}, INVALID),
    ],
    ids=str,
)
def test_layers_that_a_push_cannot_have(
    lone_pusher: Node, layers: dict[str, Any], expected: Result
) -> None:
    rows, blocks = lone_pusher.rows_cache(NUM_TENSORS), lone_pusher.blocks_cache(NUM_TENSORS)
    push_cache, push_blocks = lone_pusher.manager.push_cache, lone_pusher.manager.push_blocks
    assert result_of(push_cache, dst_cache_key=ROW, src_cache=rows, **layers) == expected
    pushed: dict[str, Any] = {"dst_cache_key": BLOCKS, "src_blocks": [0], "dst_blocks": [0]}
    assert result_of(push_blocks, src_cache=blocks, **pushed, **layers) == expected


@pytest.mark.shows("error.51")
def test_pushing_needs_remote_access(node: Node) -> None:
    node.start(LLMRole.PROMPT, 2, enable_remote_cache_accessible=False)
    rows, blocks = node.rows_cache(), node.blocks_cache()
    push_cache, push_blocks = node.manager.push_cache, node.manager.push_blocks
    assert result_of(push_cache, dst_cache_key=ROW, src_cache=rows) == INVALID
    pushed = {"src_cache": blocks, "src_blocks": [0], "dst_blocks": [0]}
    assert result_of(push_blocks, dst_cache_key=BLOCKS, **pushed) == INVALID


class EveryLayer(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


@pytest.mark.shows("error.46", "error.58")
def test_a_transfer_without_a_link_tells_so_in_its_results(
    alone: Node, is_accessible: bool
) -> None:
    configs: Any = [TransferConfig(1, [65536, 131072])]
    if is_accessible:
        configs = [TransferWithCacheKeyConfig(ROW, range(1), range(1))]
    task = alone.manager.transfer_cache_async(alone.rows_cache(), EveryLayer(), configs)
    assert task.get_results(20000) == [NOT_LINKED]
    assert task.synchronize() == NOT_LINKED
