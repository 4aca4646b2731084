"""SmolLM2 as a Hugging Face directory, which is what vLLM reads: made once, from the GGUF."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from llm_datadist.cli.demo.gguf_file import LlamaFile
from llm_datadist.cli.demo.settings import find_model
from llm_datadist.cli.failure import CommandError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from llm_datadist.cli.demo.settings import ModelSource

_CHECKED_TEXT = "A lighthouse keeper trims the wick at dusk, and then"
_CHECKED_NEW_TOKENS = 24


def huggingface_directory(build: Path) -> Path:
    """The model's directory below `build`; the first call converts and checks it.

    Raises CommandError when the package with the weights is missing, or when the conversion changed
    what the model says.
    """
    source = find_model(None)
    directory = build / source.name
    if directory.is_dir():
        return directory
    # Only a directory that passed the check gets the final name.
    unchecked = build / f"{source.name}.unchecked"
    shutil.rmtree(unchecked, ignore_errors=True)
    _convert(source, unchecked)
    unchecked.rename(directory)
    return directory


def _convert(source: ModelSource, directory: Path) -> None:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    file = LlamaFile(source.path)
    model = file.to_model(dict(file.weights())).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        source.path.parent, gguf_file=source.path.name
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)

    copy = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    copied_tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens = tokenizer(_CHECKED_TEXT)["input_ids"]
    if (
        copied_tokenizer(_CHECKED_TEXT)["input_ids"] != tokens
        or copied_tokenizer.chat_template != tokenizer.chat_template
        or not torch.equal(_logits(model, tokens), _logits(copy, tokens))
        or _greedy(model, tokens) != _greedy(copy, tokens)
    ):
        raise CommandError(
            f"the model in {directory} does not answer as {source.path} does: conversion with this "
            "version of transformers is wrong. Use the versions of examples/vllm/constraints.txt."
        )


def _logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens])).logits
    return logits


def _greedy(model: PreTrainedModel, tokens: list[int]) -> list[int]:
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=_CHECKED_NEW_TOKENS,
        )
    return [int(token) for token in answer[0]]
