"""LayerSynchronizer and the two transfer configs. Spec 3.10."""

from __future__ import annotations

from typing import Any

import pytest

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist.layerwise import (
    LayerSynchronizer,
    TransferConfig,
    TransferWithCacheKeyConfig,
    check_layer_range,
    check_optional_layer_range,
)

BAD_RANGES = [range(0), range(4, 1), range(0, 5, 2), range(0, 1, -1), range(-1, 2)]
NO_RANGES: list[Any] = [[0, 1], (0, 1), 3, "0"]
BLOCKS = BlocksCacheKey(7)
ROW = CacheKeyByIdAndIndex(8, 1)


@pytest.mark.shows("layer_synchronizer")
def test_a_synchronizer_without_its_method_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        LayerSynchronizer()  # type: ignore[abstract]


@pytest.mark.parametrize("layers", [range(1), range(80), range(3, 4)])
def test_a_range_of_layers_is_returned(layers: range) -> None:
    assert check_layer_range("layers", layers) == layers


@pytest.mark.parametrize("layers", BAD_RANGES)
def test_a_range_that_is_empty_negative_or_has_gaps_is_param_invalid(layers: range) -> None:
    with pytest.raises(LLMException, match="layers must be range") as caught:
        check_layer_range("layers", layers)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.parametrize("value", [None, *NO_RANGES])
def test_what_is_no_range_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match="layers only support"):
        check_layer_range("layers", value)


def test_an_optional_range_may_be_none() -> None:
    assert check_optional_layer_range("layers", None) is None


@pytest.mark.shows("transfer_config")
@pytest.mark.parametrize("addrs", [[1, 2], (1, 2), []])
def test_a_config_by_address_keeps_what_it_was_given(addrs: Any) -> None:
    config = TransferConfig(2**64 - 1, addrs, range(1, 2), 3)
    assert config.dst_addrs is addrs
    assert (config.dst_cluster_id, config.src_layer_range, config.src_batch_index) == (
        2**64 - 1,
        range(1, 2),
        3,
    )


@pytest.mark.shows("transfer_config")
def test_a_config_by_address_means_all_layers_of_row_0_by_default() -> None:
    config = TransferConfig(1, [])
    assert (config.src_layer_range, config.src_batch_index, config.dst_layer_range) == (
        None,
        0,
        None,
    )


WRONG_FIELDS: list[tuple[str, Any, type[Exception]]] = [
    ("dst_cluster_id", None, TypeError),
    ("dst_cluster_id", "1", TypeError),
    ("dst_cluster_id", -1, ValueError),
    ("dst_addrs", None, TypeError),
    ("dst_addrs", 1, TypeError),
    ("dst_addrs", [1, "2"], TypeError),
    ("dst_addrs", [True], TypeError),
    ("dst_addrs", [-1], ValueError),
    ("dst_addrs", [2**64], ValueError),
    *(("src_layer_range", value, TypeError) for value in NO_RANGES),
    *(("src_layer_range", value, LLMException) for value in BAD_RANGES),
    ("src_batch_index", "0", TypeError),
    ("src_batch_index", None, TypeError),
    ("src_batch_index", -1, ValueError),
    ("src_batch_index", 2**32, ValueError),
]


@pytest.mark.shows("transfer_config", "checks.integers")
@pytest.mark.parametrize(("field", "value", "error"), WRONG_FIELDS)
def test_a_config_by_address_is_checked_when_made(
    field: str, value: Any, error: type[Exception]
) -> None:
    arguments: dict[str, Any] = {"dst_cluster_id": 1, "dst_addrs": [1], field: value}
    with pytest.raises(error):
        TransferConfig(**arguments)


@pytest.mark.shows("transfer_config", "checks.integers")
@pytest.mark.parametrize(("field", "value", "error"), WRONG_FIELDS)
def test_a_config_by_address_is_checked_when_changed(
    field: str, value: Any, error: type[Exception]
) -> None:
    config = TransferConfig(1, [1])
    with pytest.raises(error):
        setattr(config, field, value)


@pytest.mark.shows("transfer_config")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dst_cluster_id", 2**64 - 1),
        ("dst_addrs", (5, 6)),
        ("src_layer_range", range(3, 9)),
        ("src_layer_range", None),
        ("src_batch_index", 2**32 - 1),
        ("dst_layer_range", range(2)),
    ],
)
def test_a_config_by_address_can_be_changed(field: str, value: Any) -> None:
    config = TransferConfig(1, [1], range(1), 1)
    setattr(config, field, value)
    assert getattr(config, field) == value


@pytest.mark.shows("transfer_config")
def test_a_config_by_address_prints_its_fields() -> None:
    text = (
        "TransferConfig(dst_cluster_id=1, dst_addrs=[2, 3], src_layer_range=range(0, 1), "
        "src_batch_index=0)"
    )
    config = TransferConfig(1, [2, 3], range(1))
    assert (str(config), repr(config)) == (text, text)


@pytest.mark.shows("transfer_with_cache_key_config")
@pytest.mark.parametrize("key", [BLOCKS, ROW])
def test_a_config_by_key_sends_to_the_cluster_of_its_key(key: Any) -> None:
    config = TransferWithCacheKeyConfig(key, range(2), range(4, 6))
    assert (config.cache_key, config.dst_cluster_id) == (key, key.cluster_id)


@pytest.mark.shows("O31")
def test_the_cluster_follows_a_change_of_the_key() -> None:
    config = TransferWithCacheKeyConfig(BLOCKS, range(1), range(1))
    config.cache_key = ROW
    assert config.dst_cluster_id == ROW.cluster_id


@pytest.mark.shows("transfer_with_cache_key_config", "O31")
def test_a_config_whose_key_was_taken_away_has_no_cluster() -> None:
    config = TransferWithCacheKeyConfig(BLOCKS, range(1), range(1))
    config.cache_key = None
    assert config.dst_cluster_id is None


@pytest.mark.shows("transfer_with_cache_key_config")
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"cache_key": None}, TypeError),
        ({"cache_key": CacheKey(1, 1)}, TypeError),
        ({"src_layer_range": None}, TypeError),
        ({"dst_layer_range": None}, TypeError),
        ({"src_layer_range": [0]}, TypeError),
        ({"src_layer_range": range(0, 4, 2)}, LLMException),
        ({"dst_layer_range": range(0)}, LLMException),
        ({"dst_layer_range": range(2)}, LLMException),
        ({"src_batch_index": -1}, ValueError),
        ({"src_batch_index": 1.0}, TypeError),
        ({"cache_key": BLOCKS, "src_batch_index": 1}, LLMException),
    ],
)
def test_a_config_by_key_is_checked_when_made(
    arguments: dict[str, Any], error: type[Exception]
) -> None:
    valid: dict[str, Any] = {
        "cache_key": ROW,
        "src_layer_range": range(1),
        "dst_layer_range": range(1),
    }
    with pytest.raises(error):
        TransferWithCacheKeyConfig(**{**valid, **arguments})


@pytest.mark.shows("transfer_with_cache_key_config")
def test_a_batch_row_of_blocks_is_refused_with_the_documented_text() -> None:
    with pytest.raises(LLMException, match="!= 0 while") as caught:
        TransferWithCacheKeyConfig(BLOCKS, range(1), range(1), 1)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.shows("transfer_with_cache_key_config")
@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("cache_key", CacheKey(1, 1), TypeError),
        ("src_layer_range", [0], TypeError),
        ("dst_layer_range", range(0), LLMException),
        ("src_batch_index", 2**32, ValueError),
    ],
)
def test_a_config_by_key_is_checked_when_changed(
    field: str, value: Any, error: type[Exception]
) -> None:
    config = TransferWithCacheKeyConfig(ROW, range(1), range(1))
    with pytest.raises(error):
        setattr(config, field, value)


@pytest.mark.shows("transfer_with_cache_key_config")
@pytest.mark.parametrize("field", ["src_layer_range", "dst_layer_range"])
@pytest.mark.parametrize("value", [None, range(9)])
def test_a_range_may_be_unset_or_lengthened_later(field: str, value: range | None) -> None:
    config = TransferWithCacheKeyConfig(ROW, range(1), range(1))
    setattr(config, field, value)
    assert getattr(config, field) == value


@pytest.mark.shows("transfer_with_cache_key_config")
def test_the_row_of_a_config_by_key_may_be_changed() -> None:
    config = TransferWithCacheKeyConfig(ROW, range(1), range(1))
    config.src_batch_index = 2
    assert config.src_batch_index == 2


def test_a_config_by_key_prints_its_fields() -> None:
    assert repr(TransferWithCacheKeyConfig(BLOCKS, range(1), range(2, 3))) == (
        "TransferWithCacheKeyConfig(cache_key=BlocksCacheKey(cluster_id=7, model_id=0), "
        "src_layer_range=range(0, 1), dst_layer_range=range(2, 3), src_batch_index=0)"
    )


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (TransferConfig(1, [1, 2]), "dst_adrs"),
        (TransferWithCacheKeyConfig(BLOCKS, range(1), range(1)), "src_layers_range"),
    ],
)
def test_a_slip_of_an_attribute_is_refused(config: object, name: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
        setattr(config, name, 1)
