"""Bad arguments and failures are different exceptions. Spec 12, row 17; 3.9."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import llm_datadist
from llm_datadist import BlocksCacheKey, CacheDesc, DataType, LLMException, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import addrs_of, make_array

if TYPE_CHECKING:
    from llm_datadist.cache import Cache
    from llm_datadist.testing.cluster import Node

DESC = CacheDesc(2, [4, 8], DataType.DT_INT8)


@pytest.fixture
def cache(node: Node) -> Cache:
    node.start(LLMRole.DECODER, 1)
    return node.blocks_cache(2, 4, 8)


@pytest.mark.shows("relies.17")
@pytest.mark.parametrize("addrs", [None, "16", (16, 32), ["16", "32"], [16, True]])
@pytest.mark.usefixtures("cache")
def test_registering_what_is_no_address_is_a_bad_argument(node: Node, addrs: Any) -> None:
    for register in (node.manager.register_cache, node.manager.register_blocks_cache):
        with pytest.raises(TypeError):
            register(DESC, addrs)


@pytest.mark.shows("relies.17")
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"src_blocks": 1}, TypeError),
        ({"src_blocks": ["1"]}, TypeError),
        ({"dst_blocks": [1.0]}, TypeError),
        ({"dst_layer_range": [0]}, TypeError),
        ({"tensor_num_per_layer": 1.0}, TypeError),
        ({"tensor_num_per_layer": -1}, ValueError),
    ],
)
def test_pulling_what_is_no_block_is_a_bad_argument(
    node: Node, cache: Cache, arguments: dict[str, Any], error: type[Exception]
) -> None:
    blocks: dict[str, Any] = {"src_blocks": [0], "dst_blocks": [0], **arguments}
    with pytest.raises(error):
        node.manager.pull_blocks(BlocksCacheKey(9), cache, **blocks)


@pytest.mark.shows("relies.17")
def test_a_failure_is_no_bad_argument(node: Node, cache: Cache) -> None:
    with pytest.raises(LLMException) as caught:
        node.manager.pull_blocks(BlocksCacheKey(9), cache, [0], [0])
    assert not isinstance(caught.value, TypeError | ValueError)
    assert caught.value.status_code is LLMStatusCode.LLM_NOT_YET_LINK


@pytest.mark.shows("relies.17")
def test_classes_can_be_replaced_where_they_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine:
        """What a program's test puts in the place of a class."""

    monkeypatch.setattr("llm_datadist.LLMDataDist", Mine)
    assert llm_datadist.LLMDataDist is Mine  # type: ignore[comparison-overlap]


@pytest.mark.shows("blocks_cache_key")
def test_a_key_of_no_cluster_names_caches_here_and_none_elsewhere(node: Node, cache: Cache) -> None:
    none: Any = None
    key = BlocksCacheKey(none, 3)
    array = make_array((2, 4, 8), 1)
    assert node.manager.register_blocks_cache(DESC, addrs_of(array), key).cache_id == 2
    with pytest.raises(LLMException, match="cluster None") as caught:
        node.manager.pull_blocks(key, cache, [0], [0])
    assert caught.value.status_code is LLMStatusCode.LLM_NOT_YET_LINK
