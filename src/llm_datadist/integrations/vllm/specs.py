"""vLLM's KV cache groups as ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from llm_datadist.integrations.vllm.groups import Group

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec


def groups_of(config: KVCacheConfig) -> list[Group]:
    """The groups that are moved. Raises ValueError for what has rules of its own, by its name."""
    return [_group_of(group) for group in config.transfer_groups]


def _group_of(group: KVCacheGroupSpec) -> Group:
    spec = group.kv_cache_spec
    specs = spec.kv_cache_specs.values() if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]
    groups = {_group_of_layers(tuple(group.layer_names), each) for each in specs}
    if len(groups) != 1 or group.host_resident:
        raise _unknown(spec)
    return groups.pop()


def _group_of_layers(layers: tuple[str, ...], spec: KVCacheSpec) -> Group:
    """By exact type: a type made of one of these frees blocks at times of its own."""
    if type(spec) in (FullAttentionSpec, MLAAttentionSpec):
        return Group(layers, spec.block_size)
    if type(spec) in (SlidingWindowSpec, SlidingWindowMLASpec):
        if spec.extra_retained_tokens or spec.prefix_replay_tokens:
            raise _unknown(spec)
        return Group(layers, spec.block_size, "window", spec.sliding_window)
    if type(spec) is ChunkedLocalAttentionSpec:
        return Group(layers, spec.block_size, "chunk", spec.attention_chunk_size)
    if type(spec) is MambaSpec:
        return Group(layers, spec.block_size, "state")
    raise _unknown(spec)


def _unknown(spec: KVCacheSpec) -> ValueError:
    return ValueError(f"LLMDataDistConnector does not move layers of {type(spec).__name__}")
