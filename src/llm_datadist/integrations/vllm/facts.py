"""What two engines must have in common to exchange KV blocks, compared field by field."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llm_datadist.integrations.vllm.printable import printable

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: rises with every change of what the two ends say to each other
CONNECTOR_VERSION = 4


def facts_of(vllm_config: VllmConfig, attention_backends: list[str]) -> dict[str, Any]:
    """What the configuration of an engine says. The worker adds what its memory is like.

    vLLM's version is among it, since the layout of a block may change with it.
    """
    from vllm import __version__ as vllm_version

    model, cache = vllm_config.model_config, vllm_config.cache_config
    speculative = vllm_config.speculative_config
    return {
        "connector version": CONNECTOR_VERSION,
        "vLLM version": vllm_version,
        "model": model.model,
        "model dtype": str(model.dtype),
        "KV cache dtype": str(cache.cache_dtype),
        "number of layers": model.get_total_num_hidden_layers(),
        "number of KV heads": model.get_total_num_kv_heads(),
        "head size": model.get_head_size(),
        "attention backends": attention_backends,
        "speculative method": speculative and speculative.method,
    }


def differences(ours: dict[str, Any], theirs: object) -> list[str]:
    """The fields that are not equal, with both values, in words."""
    if not isinstance(theirs, dict):
        return ["it says nothing of what it is"]
    names = [*ours, *(name for name in theirs if name not in ours)]
    return [
        f"{printable(name, 100)}: {_short(theirs.get(name))} there, {_short(ours.get(name))} here"
        for name in names
        if theirs.get(name) != ours.get(name)
    ]


def _short(value: object) -> str:
    return printable(json.dumps(value), 100)
