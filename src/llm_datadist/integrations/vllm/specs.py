"""vLLM's KV cache groups, and what blocks are made of, in our words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm import envs
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from llm_datadist import KVHeads, LLMException
from llm_datadist.integrations.vllm.forms import Form
from llm_datadist.integrations.vllm.groups import Group

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec


def groups_of(config: KVCacheConfig) -> list[Group]:
    """The groups that are moved. Raises ValueError for what has rules of its own, by its name."""
    return [_group_of(group) for group in config.transfer_groups]


def forms_of(vllm_config: VllmConfig, config: KVCacheConfig, rank: int) -> dict[str, Form]:
    """By layer, what a block is made of at this tensor-parallel rank.

    Of the attention of vLLM's CPU backends this was found by looking at what they write. Layers of
    others, and those whose keys are packed for matrix instructions, are not in it.
    """
    layers = vllm_config.compilation_config.static_forward_context
    forms = {}
    for group in config.transfer_groups:
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", {})
        for name in group.layer_names:
            spec = specs.get(name, group.kv_cache_spec)
            layer = layers.get(name)
            backend = layer.get_attn_backend().get_name() if layer else ""
            form = _form_of(backend, spec, vllm_config, rank)
            if form:
                forms[name] = form
    return forms


def _form_of(backend: str, spec: KVCacheSpec, vllm_config: VllmConfig, rank: int) -> Form | None:
    if isinstance(spec, MambaSpec):
        # the same bytes may be states in two orders, by the machine or by this variable
        order = envs.VLLM_SSM_CONV_STATE_LAYOUT
        return Form(f"{backend} {spec.shapes} {spec.dtypes} {order}")
    itemsize = getattr(getattr(spec, "dtype", None), "itemsize", 1)
    if backend == "CPU_MLA" and isinstance(spec, MLAAttentionSpec):
        return Form.latent(backend, spec.head_size, itemsize, spec.block_size)
    if backend != "CPU_ATTN" or spec.head_size != spec.head_size_v:
        return None
    model, num_ranks = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
    try:
        heads = KVHeads.share(model.get_total_num_kv_heads(), rank, num_ranks)
    except LLMException:
        return None
    if heads.count != spec.num_kv_heads:  # layers differ in this
        return None
    cache_dtype = vllm_config.cache_config.cache_dtype
    isa = _get_attn_isa(model.dtype, spec.block_size, spec.head_size, cache_dtype)
    if isa in ("vec", "vec16"):
        return Form.k_then_v(backend, heads, spec.head_size, itemsize, spec.block_size)
    return Form(f"{backend} {isa}", heads)


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
