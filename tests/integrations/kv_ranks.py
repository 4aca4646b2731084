"""Tensor-parallel ranks, as far as their KV cache goes: each has one head of a model of three."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from tiny_models import generate
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from llm_datadist import BlocksCacheKey, CacheDesc, KVHeads, KVLayout, LLMRole
from llm_datadist.cli.demo.settings import find_model
from llm_datadist.integrations.transformers import KVHandle, KVPool, KVShape, cache_argument
from llm_datadist.testing.cluster import Node

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.integrations.transformers import PagedCache

ORDERS = ("BHND", "BNHD")
NUM_BLOCKS = 24


@cache
def load_model(kind: str) -> Any:
    """The same in every process."""
    torch.set_num_threads(1)
    if kind == "demo":
        from llm_datadist.cli.demo.gguf_file import LlamaFile  # needs the package gguf

        file = LlamaFile(find_model(None).path)
        return file.to_model(dict(file.weights())).eval()
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, vocab_size=200, eos_token_id=None, bos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def tokens_behind(
    model: Any, answer: Sequence[int], num_tokens: int, cache: PagedCache
) -> list[int]:
    """The answer, made anew from its first token on, with what the cache has before that."""
    return generate(model, answer[: num_tokens + 1], len(answer) - num_tokens - 1, cache)


class Rank:
    """A cluster with one head."""

    def __init__(self) -> None:
        self.node = Node()
        self.kept: list[object] = []

    def start(self, number: int) -> int:
        self.number = number
        return self.node.start(LLMRole.PROMPT, 1 + number, listen_ip_info="127.0.0.1:0")

    def stop(self) -> None:
        self.node.stop()
        self.kept.clear()

    def prefill(self, kind: str, prompt: list[int], order: str, block_tokens: int) -> list[int]:
        """Computes the prompt, and keeps its own head; the blocks."""
        model, computed = load_model(kind), DynamicCache()
        with torch.no_grad():
            model(torch.tensor([prompt]), **cache_argument(computed))
        tensors, blocks = self._hold(KVShape.of(model, block_tokens), len(prompt), order)
        for index, layer in enumerate(computed.layers):
            for which, states in enumerate((layer.keys, layer.values)):
                for place, block in enumerate(blocks):
                    begin = place * block_tokens
                    part = states[0, self.number, begin : begin + block_tokens]
                    by_token = tensors[2 * index + which, block].squeeze(order.index("H") - 1)
                    by_token[: len(part)] = part
        return blocks

    def pull(
        self, kind: str, key: BlocksCacheKey, src: list[int], count: int, order: str, size: int
    ) -> list[int]:
        """Takes its own head of a whole cache; the blocks."""
        _, blocks = self._hold(KVShape.of(load_model(kind), size), count, order)
        self.node.manager.pull_blocks(key, self.cache, src, blocks, tokens=count)
        return blocks

    def publish(self, kind: str, prompt: list[int], block_tokens: int) -> KVHandle:
        """A whole cache of a pool."""
        model = load_model(kind)
        pool = KVPool(self.node.datadist, KVShape.of(model, block_tokens), NUM_BLOCKS)
        cache = pool.new_cache()
        generate(model, prompt, 1, cache)
        self.kept += [pool, cache]
        return pool.publish(cache)

    def _hold(self, shape: KVShape, count: int, order: str) -> tuple[torch.Tensor, list[int]]:
        """A cache of its head, and scattered blocks for so many tokens."""
        sizes = {"B": NUM_BLOCKS, "H": 1, "N": shape.block_tokens, "D": shape.head_dim}
        desc = CacheDesc(shape.num_tensors, [sizes[axis] for axis in order], shape.data_type)
        tensors = torch.full(
            (desc.num_tensors, *desc.shape), torch.nan, dtype=getattr(torch, shape.dtype)
        )
        heads = KVHeads.share(shape.num_kv_heads, self.number, 3)
        layout = KVLayout.of(desc, order, heads=heads)
        key = BlocksCacheKey(1 + self.number)
        self.cache = self.node.manager.register_blocks_cache(desc, tensors, key, layout=layout)
        blocks = [5 * index % NUM_BLOCKS for index in range(shape.num_blocks(count))]
        return tensors, blocks
