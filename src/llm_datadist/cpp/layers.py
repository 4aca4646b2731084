"""KvCacheExtParam: inclusive layer ranges, as the ranges that transfers take. Spec 7.4."""

from __future__ import annotations

from typing import NamedTuple

from llm_datadist.checks import check_int32, check_sequence, check_type, check_uint8
from llm_datadist.core.layers import PulledLayers, PushedLayers
from llm_datadist.cpp.types import KvCacheExtParam
from llm_datadist.errors import invalid

_PAIR = 2


class Layers(NamedTuple):
    """Which layers a transfer moves; a range that starts at -1 was not given."""

    src: range
    dst: range
    per_layer: int

    @classmethod
    def parse(cls, ext_param: object) -> Layers:
        """Of a KvCacheExtParam; None stands for its defaults.

        Raises TypeError; ValueError or LLMException (LLM_PARAM_INVALID) unless each bound is at
        least -1, ranges are in order, and layers have tensors.
        """
        ext = KvCacheExtParam() if ext_param is None else ext_param
        ext = check_type("ext_param", ext, KvCacheExtParam)
        per_layer = check_uint8("tensor_num_per_layer", ext.tensor_num_per_layer)
        if not per_layer:
            raise invalid("tensor_num_per_layer must be greater than 0")
        src = _inclusive("src_layer_range", ext.src_layer_range)
        return cls(src, _inclusive("dst_layer_range", ext.dst_layer_range), per_layer)

    def for_pull(self) -> PulledLayers:
        """The tensors of a pull. Both ranges count, or neither does."""
        if self.src.start < 0 or self.dst.start < 0:
            return PulledLayers(None, None, self.per_layer)
        return PulledLayers.of(self.src, self.dst, self.per_layer)

    def for_push(self, num_tensors: int) -> PushedLayers:
        """The layers of a push out of a cache with so many tensors. Raises LLMException.

        Without a source range it is all layers, into the first of the peer. Tensors that make no
        whole layer count as one, which the push refuses: success never means that none moved.
        """
        if len(self.src) != len(self.dst):
            raise invalid(
                f"src_layer_range and dst_layer_range must be equally long, "
                f"got {len(self.src)} and {len(self.dst)} layers"
            )
        if self.src.start < 0:
            everything = range(-(-num_tensors // self.per_layer))
            return PushedLayers(everything, everything, self.per_layer)
        if self.dst.start < 0:
            raise invalid("dst_layer_range is needed where src_layer_range is given")
        return PushedLayers(self.src, self.dst, self.per_layer)


def _inclusive(name: str, bounds: object) -> range:
    """Keeps a start of -1, which says that the range was not given."""
    pair = check_sequence(name, bounds, int)
    if len(pair) != _PAIR:
        raise invalid(f"{name} must be (first, last), got {pair}")
    first, last = (check_int32(name, bound) for bound in pair)
    if first < -1 or last < first:
        raise invalid(f"{name} must be (first, last) with -1 <= first <= last, got {pair}")
    return range(first, last + 1)
