"""Models that are made in no time, the same in every process, and a process that prefills."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import (
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
)

from llm_datadist import LLMRole
from llm_datadist.integrations.transformers import KVPool, KVShape, cache_argument
from llm_datadist.testing.cluster import Node

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.integrations.transformers import KVHandle, PagedCache

VOCABULARY = 200
BLOCK_TOKENS = 4
PADDING = 0
#: no answer ends before it is as long as may be
TOKENS = {"vocab_size": VOCABULARY, "eos_token_id": None, "bos_token_id": None}

CONFIGS = {
    "grouped heads": LlamaConfig(
        hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=PADDING, **TOKENS,
    ),
    "other names": GPT2Config(n_embd=32, n_layer=3, n_head=2, pad_token_id=PADDING, **TOKENS),
    "sliding window": MistralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=6, pad_token_id=PADDING, **TOKENS,
    ),
    "some windows": Gemma2Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=6, pad_token_id=PADDING, **TOKENS,
    ),
    "multi-query": FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, multi_query=True,
        new_decoder_architecture=False, alibi=False, pad_token_id=PADDING, **TOKENS,
    ),
    "latent": DeepseekV3Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=12, moe_intermediate_size=16, n_routed_experts=4,
        n_group=1, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1,
        pad_token_id=PADDING, **TOKENS,
    ),
}  # fmt: skip


def make_model(kind: str = "grouped heads", dtype: str = "float32") -> Any:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind])
    return model.to(getattr(torch, dtype)).eval()


def make_prompt(num_tokens: int) -> list[int]:
    return [1 + 37 * index % (VOCABULARY - 1) for index in range(num_tokens)]


def generate(
    model: Any, tokens: Sequence[int], count: int, cache: PagedCache | None = None
) -> list[int]:
    """The tokens and `count` more; without a cache as transformers does it by itself."""
    ids = torch.tensor([tokens])
    more = {} if cache is None else cache_argument(cache)
    answer = model.generate(ids, max_new_tokens=count, do_sample=False, **more)
    return [int(token) for token in answer[0]]


def pad(prompts: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Prompts of unequal lengths as one batch, padded before their first token; its mask."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), PADDING)
    mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def generate_batch(
    model: Any, ids: Any, mask: Any, count: int, cache: PagedCache | None = None, **how: object
) -> Any:
    """As `generate`; the mask of what was padded may be shorter than the tokens are by now."""
    ones = torch.ones((len(ids), ids.shape[1] - mask.shape[1]), dtype=torch.long)
    more = {} if cache is None else cache_argument(cache)
    settings = {"do_sample": False, **how}
    return model.generate(
        ids, attention_mask=torch.cat([mask, ones], 1), max_new_tokens=count, **settings, **more
    )


class Prefill:
    """A cluster with a model and a pool, driven from a test."""

    def __init__(self) -> None:
        self.node = Node()
        self._kind = "grouped heads"
        self.model = make_model(self._kind)
        self._pool: KVPool | None = None

    @property
    def pool(self) -> KVPool:
        assert self._pool is not None, "call start first"
        return self._pool

    def start(self, num_blocks: int = 16, kind: str = "grouped heads", **settings: object) -> int:
        """The port that it listens on."""
        if kind != self._kind:
            self._kind, self.model = kind, make_model(kind)
        port = self.node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
        self._pool = KVPool(self.node.datadist, KVShape.of(self.model, BLOCK_TOKENS), num_blocks)
        return port

    def stop(self) -> None:
        self.node.stop()

    def compute(self, tokens: list[int], num_more: int = 0) -> tuple[str, list[int]]:
        """The handle, and the tokens with the next one. It goes on for `num_more` after that."""
        cache = self.pool.new_cache()
        answer = generate(self.model, tokens, 1, cache)
        handle = self.pool.publish(cache)
        if num_more:
            generate(self.model, answer, num_more, cache)
        return handle.to_json(), answer

    def compute_batch(self, prompts: list[list[int]]) -> tuple[str, list[list[int]]]:
        """The handle of all of them, and the padded tokens with the next ones."""
        cache = self.pool.new_cache()
        answers = generate_batch(self.model, *pad(prompts), 1, cache)
        return self.pool.publish(cache).to_json(), answers.tolist()

    def release(self, handle: KVHandle) -> int:
        """How many blocks are free then."""
        self.pool.release(handle)
        return self.pool.num_free_blocks

    def go_on(self, handle: KVHandle, tokens: list[int], count: int) -> list[int]:
        with self.pool.fetch(handle) as cache:
            return generate(self.model, tokens, count, cache)
