"""Arguments of transfers that take more than one look. Raise as the methods of CacheManager do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.checks import (
    check_int64,
    check_optional,
    check_type,
    check_uint32,
    check_uint64,
    check_uint64_sequence,
)
from llm_datadist.core.layers import PER_LAYER, PulledLayers, PushedLayers
from llm_datadist.errors import invalid
from llm_datadist.layerwise import check_optional_layer_range

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llm_datadist.core.strips import Tokens


def check_whole_row(size: object) -> None:
    """A push has no other size than -1. Raises TypeError, ValueError, LLMException. Spec 6.11."""
    if check_int64("size", size) != -1:
        raise invalid(f"size must be -1, got {size}: a push moves whole rows")


def check_tokens(tokens: object) -> Tokens:
    """How many tokens, or which; None: all that the blocks hold. Raises TypeError."""
    return None if tokens is None else check_type("tokens", tokens, int, range)


def pulled_layers(options: Mapping[str, object]) -> PulledLayers:
    """Of the keywords of a pull; others are ignored. Spec 6.9."""
    per_layer = _check_per_layer(options.get("tensor_num_per_layer", PER_LAYER))
    src = _check_layers("src_layer_range", options.get("src_layer_range"))
    dst = _check_layers("dst_layer_range", options.get("dst_layer_range"))
    return PulledLayers.of(src, dst, per_layer)


def pushed_layers(src: object, dst: object, per_layer: object) -> PushedLayers:
    """Of the arguments of a push. Spec 6.11."""
    count = _check_per_layer(per_layer)
    return PushedLayers(
        check_optional_layer_range("src_layer_range", src),
        check_optional_layer_range("dst_layer_range", dst),
        count,
    )


def _check_per_layer(value: object) -> int:
    per_layer = check_uint32("tensor_num_per_layer", value)
    if not per_layer:
        raise invalid("tensor_num_per_layer must be greater than 0")
    return per_layer


def _check_layers(name: str, value: object) -> range | None:
    layers = check_optional(name, value, range)
    if not layers:
        return None
    if layers.step != 1 or layers.start < 0:
        raise invalid(f"{name} must count up by 1 from 0 or more, got {layers}")
    check_uint32(f"the end of {name}", layers.stop)
    return layers


def check_layerwise_blocks(
    src: object, dst: object, block_nbytes: object
) -> tuple[Sequence[int], Sequence[int], int]:
    """The blocks of a layer-wise transfer. Spec 6.12."""
    dst_list = check_uint64_sequence("dst_block_indices", () if dst is None else dst)
    src_list = check_uint64_sequence("src_block_indices", () if src is None else src)
    if block_nbytes is not None:
        check_uint64("dst_block_memory_size", block_nbytes)
    if src_list and not dst_list:
        raise invalid("transfer from blocks to cache is not supported: give dst_block_indices")
    if src_list and len(src_list) != len(dst_list):
        raise invalid(f"{len(src_list)} source blocks do not pair with {len(dst_list)}")
    if dst_list and not src_list and block_nbytes is None:
        raise invalid("dst_block_memory_size is needed to cut a row into dst_block_indices")
    return src_list, dst_list, check_uint64("dst_block_memory_size", block_nbytes or 0)
