"""A model that loads in no time, for what is not about answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from llm_datadist.cli.demo.settings import find_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights, and the tokenizer of the packaged model.

    Its answers never end before they are as long as may be.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "tiny"
    packaged = find_model(None).path
    tokenizer = PreTrainedTokenizerFast.from_pretrained(packaged.parent, gguf_file=packaged.name)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
