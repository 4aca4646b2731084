"""Small models of every kind of KV cache, with random weights: made by seed, the same each time.

What is compared are answers of the same weights by one way and by another, so nothing has to be
learned. The weights are large, beside those of the words alone, so that an answer depends on all of
the prompt and not on its last word.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers.utils import logging as transformers_logging

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

NUM_WORDS = 512
_WORDS_OF_WEIGHTS = 0.05


def words(source: Random, count: int) -> list[int]:
    """So many random words, as tokens."""
    return [source.randrange(1, NUM_WORDS) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class RandomModel:
    """One kind of model."""

    name: str
    config_class: str
    #: what its KV cache is made of, in vLLM's words
    groups: str
    fields: dict[str, Any]
    #: that its kernels run with on a CPU
    dtype: str = "float32"
    #: of the weights: smaller where rounding (bfloat16, large sums) would choose other tokens
    scale: float = 0.15
    #: whether prefill must compute as many tokens at once as the plain server has, for equal bits
    needs_same_batch: bool = False

    def directory(self, build: Path) -> Path:
        """Where it is, below `build`; the first call makes it."""
        directory = build / f"random-{self.name}"
        if not directory.is_dir():
            unfinished = build / f"random-{self.name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            self._make(unfinished)
            unfinished.rename(directory)
        return directory

    def _make(self, directory: Path) -> None:
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        config = getattr(transformers, self.config_class)(
            vocab_size=NUM_WORDS, initializer_range=self.scale,
            eos_token_id=None, bos_token_id=None,
            pad_token_id=0, max_position_embeddings=2048, tie_word_embeddings=False, **self.fields,
        )  # fmt: skip
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            model.get_input_embeddings().weight.normal_(0, self.scale * _WORDS_OF_WEIGHTS)
        model.to(getattr(torch, self.dtype)).save_pretrained(directory)
        words = {f"w{number}": number for number in range(NUM_WORDS)}
        tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


GEMMA3 = RandomModel(
    "gemma-3", "Gemma3TextConfig", "5 sliding windows of 128 tokens, 1 full",
    {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "sliding_window": 128, "query_pre_attn_scalar": 1,
    },
)  # fmt: skip
MAMBA2 = RandomModel(
    "mamba-2", "Mamba2Config", "1 Mamba",
    {
        "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 32,
        "state_size": 32, "n_groups": 2, "expand": 2, "chunk_size": 64,
    },
)  # fmt: skip
QWEN3_NEXT = RandomModel(
    "qwen3-next", "Qwen3NextConfig", "3 GDN, 1 full",
    {
        "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    dtype="bfloat16",
    scale=0.05,
)  # fmt: skip
DEEPSEEK_V2 = RandomModel(
    "deepseek-v2", "DeepseekV2Config", "1 MLA",
    {
        "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "first_k_dense_replace": 3, "q_lora_rank": None, "kv_lora_rank": 512,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_group": 1,
        "topk_group": 1, "topk_method": "greedy",
    },
    scale=0.1,
    needs_same_batch=True,
)  # fmt: skip
LLAMA = RandomModel(
    "llama", "LlamaConfig", "1 full",
    {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    },
)  # fmt: skip
HYBRID = (GEMMA3, MAMBA2, QWEN3_NEXT, DEEPSEEK_V2)
