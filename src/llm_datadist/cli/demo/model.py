"""The language model of a worker, on the CPU, in float32 and greedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from llm_datadist.cli.demo.gguf_file import load_llama
from llm_datadist.integrations.transformers import KVShape, cache_argument

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import Cache, PreTrainedModel

    from llm_datadist.cli.demo.model_source import ModelSource
    from llm_datadist.cli.demo.prompts import Prompt
    from llm_datadist.cli.demo.settings import Settings

#: called with how far loading is (0 to 1) and what comes next
Report: TypeAlias = Callable[[float, str], None]


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
    def load(cls, settings: Settings, report: Report) -> LanguageModel:
        """Load what `settings` name. Sets torch's threads for the whole process."""
        torch.set_num_threads(settings.num_threads)
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        model = _load_weights(settings.model, report)
        report(0.8, "reading the tokenizer")
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


def _load_weights(source: ModelSource, report: Report) -> PreTrainedModel:
    if source.is_gguf:
        return load_llama(source.path, report)
    report(0.2, f"reading {source.name}")
    return AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)


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
