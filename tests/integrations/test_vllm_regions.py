"""vLLM's KV tensors as blocks, and its configuration as ours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llm_datadist.integrations.vllm.facts import differences
from llm_datadist.integrations.vllm.groups import Group
from llm_datadist.integrations.vllm.regions import Region, regions_of
from llm_datadist.integrations.vllm.settings import settings_of

torch = pytest.importorskip("torch")

NUM_BLOCKS = 6


def found(kv: dict[str, Any], *groups: tuple[str, ...]) -> list[Region]:
    return regions_of(kv, NUM_BLOCKS, [Group(layers, 4) for layers in groups or [tuple(kv)]], {})


def test_layers_of_one_shape_are_one_region() -> None:
    kv = {f"layers.{layer}": torch.zeros(NUM_BLOCKS, 2, 4, 8) for layer in range(3)}
    (region,) = found(kv)
    assert (region.num_blocks, region.block_nbytes) == (NUM_BLOCKS, 2 * 4 * 8 * 4)
    assert region.layers == list(kv)
    assert region.addrs == [tensor.data_ptr() for tensor in kv.values()]
    assert region.nbytes(2) == 2 * 3 * 2 * 4 * 8 * 4


def test_layers_of_other_shapes_are_regions_of_their_own() -> None:
    kv = {"a": torch.zeros(NUM_BLOCKS, 8), "b": torch.zeros(NUM_BLOCKS, 16), "c": torch.zeros(6, 8)}
    assert [(region.block_nbytes, region.layers) for region in found(kv)] == [
        (32, ["a", "c"]),
        (64, ["b"]),
    ]


def test_several_blocks_of_the_kernel_are_one_of_the_scheduler() -> None:
    (region,) = found({"a": torch.zeros(4 * NUM_BLOCKS, 8)})
    assert (region.num_blocks, region.block_nbytes) == (NUM_BLOCKS, 4 * 8 * 4)


def test_layers_that_share_their_memory_are_moved_once() -> None:
    tensor = torch.zeros(NUM_BLOCKS, 8)
    (region,) = found({"a": tensor, "b": tensor})
    assert region.addrs == [tensor.data_ptr()]


def test_groups_that_share_their_memory_have_blocks_of_their_own_there() -> None:
    tensor = torch.zeros(NUM_BLOCKS, 8)
    regions = found({"a": tensor, "b": tensor, "shared": tensor}, ("a",), ("b",))
    assert [(region.group, region.layers) for region in regions] == [(0, ["a"]), (1, ["b"])]
    assert {addr for region in regions for addr in region.addrs} == {tensor.data_ptr()}


def test_of_layers_whose_blocks_lie_between_each_other_only_the_own_bytes_are_moved() -> None:
    memory = torch.zeros(NUM_BLOCKS, 3, 8)
    (region,) = found({f"layers.{i}": memory[:, i] for i in range(3)})
    assert region.addrs == [memory[:, i].data_ptr() for i in range(3)]
    assert (region.block_nbytes, region.stride_nbytes) == (8 * 4, 3 * 8 * 4)


def test_a_layer_without_a_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no KV cache of b"):
        found({"a": torch.zeros(NUM_BLOCKS, 8)}, ("a", "b"))


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(NUM_BLOCKS + 1, 8), r"a has shape \(7, 8\): .* should count 6 blocks"),
        (torch.zeros(2, NUM_BLOCKS, 8), r"a has shape \(2, 6, 8\)"),
        (torch.zeros(8, 4, NUM_BLOCKS).permute(2, 0, 1), "a has blocks that are not contiguous"),
        (torch.zeros(NUM_BLOCKS, 8, device="meta"), "a is on meta"),
    ],
)
def test_what_cannot_be_moved_is_refused_by_name(tensor: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        found({"a": tensor})


def transfer_config(**extra: Any) -> Any:
    return SimpleNamespace(
        kv_connector_extra_config=extra, engine_id="e", kv_role="kv_producer", kv_port=5000
    )


def test_settings_are_read_from_the_transfer_config() -> None:
    settings = settings_of(
        transfer_config(host="10.0.0.1", llm_config={"transfer_path": "tcp"}), first_rank=2
    )
    assert (settings.engine_id, settings.port, settings.is_producer) == ("e", 5002, True)
    assert settings.extra.host == "10.0.0.1"
    assert settings.extra.llm_config == {"transfer_path": "tcp"}
    assert settings_of(transfer_config()).extra.kv_lease_duration == 30


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"hots": "10.0.0.1"}, "hots"),
        ({"host": 7}, "host"),
        ({"kv_lease_duration": 0}, "kv_lease_duration"),
        ({"llm_config": {"transfer_paht": "tcp"}}, "LLMConfig has no transfer_paht"),
    ],
)
def test_settings_that_do_not_exist_are_refused_by_name(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"kv_connector_extra_config: .*{said}"):
        settings_of(transfer_config(**extra))


def test_facts_are_compared_field_by_field() -> None:
    ours = {"model": "a", "block size": 16, "only here": 1}
    theirs = {"model": "a", "block size": 128, "only there": [1, 2]}
    assert differences(ours, theirs) == [
        "block size: 128 there, 16 here",
        "only here: null there, 1 here",
        "only there: [1, 2] there, null here",
    ]
    assert differences(ours, dict(ours)) == []
