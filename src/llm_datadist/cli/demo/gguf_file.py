"""A Llama model in a GGUF file.

transformers can read one by itself (`gguf_file=`), but reads the whole file twice, which takes half
a minute here, and asks for one more package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import gguf
import torch
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    Weights: TypeAlias = NDArray[np.float32]


class LlamaFile:
    """An open file. `to_model(dict(weights()))` is the model, as float32."""

    def __init__(self, path: Path) -> None:
        self._tensors = (reader := gguf.GGUFReader(path)).tensors
        self._config = _config(reader)

    @property
    def num_weights(self) -> int:
        """How many `weights` there are."""
        return len(self._tensors)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters by the model's names, expanded one by one."""
        names = _parameter_names(self._config)
        for tensor in self._tensors:
            yield names[tensor.name], _weight(tensor, self._config)

    def to_model(self, weights: Mapping[str, torch.Tensor]) -> LlamaForCausalLM:
        """The model with these weights."""
        return LlamaForCausalLM.from_pretrained(None, config=self._config, state_dict=weights)


def _config(reader: gguf.GGUFReader) -> LlamaConfig:
    def value(key: str) -> float:
        contents: float = reader.fields[key].contents()
        return contents

    return LlamaConfig(
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        dtype=torch.float32,
    )


def _parameter_names(config: LlamaConfig) -> dict[str, str]:
    """GGUF's name of each parameter -> the model's."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with torch.device("meta"):
        parameters = LlamaForCausalLM(config).state_dict()
    return {names.get_name(name, try_suffixes=(".weight",)): name for name in parameters}


def _weight(tensor: gguf.ReaderTensor, config: LlamaConfig) -> torch.Tensor:
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    if ".attn_q." in tensor.name:
        values = _unpermute(values, config.num_attention_heads)
    elif ".attn_k." in tensor.name:
        values = _unpermute(values, config.num_key_value_heads)
    # A copy into torch's own, aligned memory: the kernels' last bits can depend on alignment.
    return torch.tensor(values)


def _unpermute(values: Weights, num_heads: int) -> Weights:
    """GGUF keeps the rows of a head as the pairs that rotate together; transformers as halves."""
    pairs = values.reshape(num_heads, -1, 2, values.shape[-1])
    return pairs.swapaxes(1, 2).reshape(values.shape)
