"""What a model keeps of each token: found out by letting it read one.

Its configuration does not say. Whether a multi-query model has one head or many is spelt in as many
ways as there are models, and what DeepSeek's models keep has changed with transformers' version.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel
from transformers.cache_utils import Cache, DynamicLayer

from llm_datadist.errors import LLMException, invalid
from llm_datadist.integrations.transformers.argument import cache_argument

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: what a layer's whole past can be kept for; a sliding window is a matter of the mask alone
_LAYER_TYPES: Final = {"full_attention", "sliding_attention"}


#: heads, size of a head and type: of keys, and of values
_Noted: TypeAlias = "list[tuple[int, int, torch.dtype]]"


@dataclass(frozen=True, slots=True)
class Kept:
    """Of one token, in every layer alike."""

    num_layers: int
    num_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype


def kept_by(model: PreTrainedModel) -> Kept:
    """What this model keeps. It reads one token, without a trace.

    Raises LLMException (LLM_PARAM_INVALID), which names the layer, for a model whose layers differ
    or do not keep all tokens.
    """
    refuse_by_config(model.config)
    if model.device.type not in ("cpu", "meta"):
        raise invalid(f"the model is on {model.device}: so far a pool is for the CPU alone")
    decoder = model.config.get_text_config(decoder=True)
    layers = [_Layer() for _ in range(decoder.num_hidden_layers)]
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    try:
        # drop-out, in a model that is being trained, takes random numbers
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(input_ids=token, use_cache=True, **cache_argument(Cache(layers=layers)))
    except Exception as error:  # models are anybody's code
        raise _refused(
            model.config, f"it does not work over a cache of keys and values ({error})"
        ) from error
    return _common(model.config, [layer.kept for layer in layers])


def kept_without_weights(config: PreTrainedConfig) -> Kept:
    """As `kept_by`, for the decoder of such a model. It has no memory for its weights."""
    refuse_by_config(config)
    decoder = copy.deepcopy(config.get_text_config(decoder=True))
    decoder.pad_token_id = None  # some look for it among the tokens, which have no values here
    try:
        with FakeTensorMode():
            # bfloat16, for without memory torch multiplies experts' matrices of no other type
            return kept_by(AutoModel.from_config(decoder, dtype=torch.bfloat16).eval())
    except LLMException:
        raise
    except Exception as error:
        raise _refused(config, f"transformers cannot make it ({error})") from error


def refuse_by_config(config: PreTrainedConfig) -> None:
    """Raises LLMException (LLM_PARAM_INVALID) for what need not be tried."""
    if config.is_encoder_decoder:
        raise _refused(config, "it has an encoder")
    for index, kind in enumerate(_layer_types(config)):
        if kind not in _LAYER_TYPES:
            raise _refused(config, f"its layer {index} is of type {kind}")


class _Layer(DynamicLayer):  # type: ignore[misc]  # mypy does not follow transformers
    """Notes what it is given."""

    kept: _Noted | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **more: object
    ) -> object:
        self.kept = [
            (each.shape[1], each.shape[-1], each.dtype) for each in (key_states, value_states)
        ]
        return super().update(key_states, value_states, *args, **more)


def _common(config: PreTrainedConfig, layers: list[_Noted | None]) -> Kept:
    def name(index: int) -> str:
        kinds = _layer_types(config)
        return f"layer {index}" + (f" ({kinds[index]})" if index < len(kinds) else "")

    first: _Noted | None = None
    while len(layers) > 1 and layers[-1] is None:  # the last ones of some use those of others
        layers.pop()
    for index, kept in enumerate(layers):
        if kept is None:
            raise _refused(config, f"its {name(index)} keeps no keys and values of its own")
        (heads, key_dim, dtype), (value_heads, value_dim, value_dtype) = kept
        if (value_heads, value_dtype) != (heads, dtype):
            raise _refused(config, f"its {name(index)} keeps {_in_words(kept)}")
        first = first or kept
        if kept != first:
            raise _refused(
                config,
                f"its layers differ: {name(index)} keeps {_in_words(kept)}, {name(0)} "
                f"{_in_words(first)}",
            )
    return Kept(len(layers), heads, key_dim, value_dim, dtype)


def _in_words(kept: _Noted) -> str:
    keys, values = (f"{heads} heads of {dim}" for heads, dim, _ in kept)
    return f"keys and values of {keys}" if keys == values else f"keys of {keys}, values of {values}"


def _layer_types(config: PreTrainedConfig) -> list[str]:
    return list(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())


def _refused(config: PreTrainedConfig, why: str) -> LLMException:
    return invalid(
        f"{type(config).__name__} is not supported: {why}; only decoders that keep keys and "
        "values of all tokens, alike in every layer, are"
    )
