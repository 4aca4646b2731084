"""The language model of a worker, on the CPU, in float32 and greedy; its pool of blocks."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from llm_datadist.cli.demo.request import Loading
from llm_datadist.integrations.transformers import KVPool, KVShape, cache_argument

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from transformers import Cache, PreTrainedModel

    from llm_datadist.cli.demo.request import Prompt
    from llm_datadist.cli.demo.settings import ModelSource, Settings
    from llm_datadist.datadist import LLMDataDist

#: room for the demo's longest prompt, and for shorter ones beside it
_NUM_PROMPT_TOKENS = 4096


class LanguageModel:
    """A causal language model and its tokenizer."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.end_tokens = _end_tokens(model.generation_config.eos_token_id)
        # Greedy and nothing else: the model's own settings may ask for sampling or penalties.
        model.generation_config = GenerationConfig(
            do_sample=False,
            eos_token_id=sorted(self.end_tokens) or None,
            pad_token_id=min(self.end_tokens, default=0),
        )

    @classmethod
    def load(cls, settings: Settings) -> Generator[Loading, None, LanguageModel]:
        """Load what `settings` name, step by step. Sets torch's threads for the whole process."""
        torch.set_num_threads(settings.num_threads)
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        model = yield from _load_weights(settings.model)
        yield Loading(0.8, "reading the tokenizer")
        return cls(model.eval(), _load_tokenizer(settings.model))

    def kv_shape(self, block_tokens: int) -> KVShape:
        """The shape of this model's KV cache in blocks of `block_tokens`."""
        return KVShape.of(self._model, block_tokens)

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens, in the model's chat form if it has one."""
        if not prompt.is_chat or self._tokenizer.chat_template is None:
            return list(self._tokenizer(prompt.text)["input_ids"])
        messages = [{"role": "user", "content": prompt.text}]
        return list(
            self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, without the special ones."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def next_token(self, tokens: Sequence[int], cache: Cache) -> int:
        """The likeliest token after `cache` and `tokens`; `tokens` are added to `cache`."""
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor([tokens]), **cache_argument(cache), logits_to_keep=1
            )
        return int(output.logits[0, -1].argmax())

    def generate(self, tokens: Sequence[int], max_new_tokens: int) -> list[int]:
        """What transformers' own greedy generation answers to `tokens`."""
        ids = torch.tensor([tokens])
        with torch.inference_mode():
            answer = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens
            )
        return [int(token) for token in answer[0, len(tokens) :]]


def make_pool(
    cluster: LLMDataDist, shape: KVShape, seed: int, num_answer_tokens: int = 0
) -> KVPool:
    """A pool that holds a few of the demo's prompts at a time, and as long an answer to one.

    A pool that has served requests for a while hands out numbers all over the place. This one does
    so from the start, so that every transfer of the demo is the scattered one of real life.
    """
    num_blocks = shape.num_blocks(_NUM_PROMPT_TOKENS) + shape.num_blocks(num_answer_tokens)
    pool = KVPool(cluster, shape, num_blocks)
    caches = [pool.new_cache() for _ in range(num_blocks)]
    for cache in caches:
        cache.reserve(1)
    random.Random(seed).shuffle(caches)
    for cache in caches:
        cache.release()
    return pool


def _load_weights(source: ModelSource) -> Generator[Loading, None, PreTrainedModel]:
    yield Loading(0.2, f"reading {source.path.name if source.is_gguf else source.name}")
    if not source.is_gguf:
        return AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    # only the packaged model needs the package gguf
    from llm_datadist.cli.demo.gguf_file import LlamaFile

    file = LlamaFile(source.path)
    weights: dict[str, torch.Tensor] = {}
    for name, weight in file.weights():
        yield Loading(0.5 + 0.3 * len(weights) / file.num_weights, "expanding the weights")
        weights[name] = weight
    return file.to_model(weights)


def _load_tokenizer(source: ModelSource) -> PreTrainedTokenizerFast:
    if source.is_gguf:
        # Not AutoTokenizer: that would first read the whole file to learn the model's type.
        return PreTrainedTokenizerFast.from_pretrained(
            source.path.parent, gguf_file=source.path.name
        )
    return AutoTokenizer.from_pretrained(source.path)


def _end_tokens(setting: int | list[int] | None) -> frozenset[int]:
    if setting is None:
        return frozenset()
    return frozenset([setting] if isinstance(setting, int) else setting)
