"""Layers: which tensors of a cache a transfer moves. All arithmetic of layer ranges is here.

With n tensors per layer, layer i of a cache is its tensors [i*n, (i+1)*n). The calls differ in what
an open range means and in what must fit, as the reference has it: pulls (spec 6.9), pushes (6.11)
and the layer-wise transfer (6.12), where a layer is K and V and the last may have one tensor only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llm_datadist.errors import invalid

if TYPE_CHECKING:
    from llm_datadist.core.geometry import Geometry, Layout

#: tensors of a layer where nobody says otherwise: K and V
PER_LAYER = 2


def tensors_of(layers: range, per_layer: int) -> range:
    """The tensors of whole layers."""
    return range(layers.start * per_layer, layers.stop * per_layer)


def count_layers(num_tensors: int) -> int:
    """The layers of a cache by pairs; the last may be one tensor. Spec 6.12."""
    return -(-num_tensors // PER_LAYER)


def pairs_of(layers: range, num_tensors: int) -> range:
    """The tensors of these layers by pairs, as far as the cache has them. Spec 6.12."""
    wanted = tensors_of(layers, PER_LAYER)
    stop = min(wanted.stop, num_tensors)
    return range(min(wanted.start, stop), stop)


@dataclass(frozen=True, slots=True)
class PulledLayers:
    """Which tensors a pull takes, and which of ours they fill; None: all. Spec 6.9."""

    src: range | None = None
    dst: range | None = None
    per_layer: int = PER_LAYER

    @property
    def are_all(self) -> bool:
        """Whether no range is given: caches with layouts then match their layers by name."""
        return self.src is None and self.dst is None

    @classmethod
    def of(cls, src: range | None, dst: range | None, per_layer: int) -> PulledLayers:
        """Of ranges of layers. An empty range is the same as none given."""
        return cls(
            tensors_of(src, per_layer) if src else None,
            tensors_of(dst, per_layer) if dst else None,
            per_layer,
        )

    def check(self, ours: Geometry) -> None:
        """The rules that need only the puller's cache. Raises LLM_PARAM_INVALID."""
        if self.src is None and self.dst is None:
            return
        if ours.num_tensors % self.per_layer:
            raise invalid(
                f"the local cache has {ours.num_tensors} tensors, which are no whole layers of "
                f"{self.per_layer}: set tensor_num_per_layer"
            )
        if self.dst is not None and self.dst.stop > ours.num_tensors:
            raise invalid(
                f"dst_layer_range reaches tensor {self.dst.stop - 1}, "
                f"the local cache has {ours.num_tensors}"
            )
        wanted = ours.num_tensors if self.dst is None else len(self.dst)
        if self.src is not None and len(self.src) != wanted:
            raise invalid(f"src_layer_range has {len(self.src)} tensors, the destination {wanted}")

    def select(self, src: Layout, dst: Layout) -> tuple[Layout, Layout]:
        """Both layouts cut to their tensors, which must be as many. Raises LLM_PARAM_INVALID."""
        if self.src is not None and self.src.stop > src.geometry.num_tensors:
            raise invalid(
                f"src_layer_range reaches tensor {self.src.stop - 1}, "
                f"the remote cache has {src.geometry.num_tensors}"
            )
        src = src if self.src is None else src.tensors(self.src)
        dst = dst if self.dst is None else dst.tensors(self.dst)
        if src.geometry.num_tensors != dst.geometry.num_tensors:
            raise invalid(
                f"{src.geometry.num_tensors} remote tensors for {dst.geometry.num_tensors} local "
                "ones: give layer ranges of equal length"
            )
        return src, dst


ALL_PULLED = PulledLayers()


@dataclass(frozen=True, slots=True)
class PushedLayers:
    """Which layers a push moves, and where to; None: all layers of the source. Spec 6.11."""

    src: range | None
    dst: range | None
    per_layer: int

    @property
    def are_all(self) -> bool:
        """As of `PulledLayers`."""
        return self.src is None and self.dst is None

    def check(self, ours: Geometry) -> None:
        """The rules that need only the pusher's cache. Raises LLM_PARAM_INVALID."""
        self._ranges(ours)

    def moves_nothing(self, ours: Geometry) -> bool:
        """Whether the cache has no whole layer, so that a push of all of them moves nothing."""
        return self.src is None and ours.num_tensors < self.per_layer

    def select(self, src: Layout, dst: Layout) -> tuple[Layout, Layout]:
        """Both layouts cut to their layers. Raises LLM_PARAM_INVALID."""
        wanted, target = self._ranges(src.geometry)
        if wanted and src.geometry.num_tensors % self.per_layer:
            raise invalid(
                f"the source has {src.geometry.num_tensors} tensors, which are no whole layers of "
                f"{self.per_layer}: set tensor_num_per_layer"
            )
        self._check_there(wanted, src.geometry, "source")
        self._check_there(target, dst.geometry, "destination")
        return (
            src.tensors(tensors_of(wanted, self.per_layer)),
            dst.tensors(tensors_of(target, self.per_layer)),
        )

    def _ranges(self, src: Geometry) -> tuple[range, range]:
        """Both ranges. A source of fewer tensors than a layer has none: none is pushed (O14)."""
        everything = range(src.num_tensors // self.per_layer)
        wanted = everything if self.src is None else self.src
        target = everything if self.dst is None else self.dst
        if len(wanted) != len(target):
            raise invalid(f"src_layer_range {wanted} and dst_layer_range {target} differ in length")
        return wanted, target

    def _check_there(self, layers: range, geometry: Geometry, whose: str) -> None:
        num_layers = geometry.num_tensors // self.per_layer
        if layers and layers.stop > num_layers:
            raise invalid(
                f"layer {layers.stop - 1} is out of range: the {whose} has {num_layers} layers of "
                f"{self.per_layer} tensors"
            )


@dataclass(frozen=True, slots=True)
class OneLayer:
    """Layer `src` of ours goes to layer `dst` of the peer's cache. Spec 6.12, O6."""

    src: int
    dst: int
    are_all: ClassVar[bool] = False

    def check(self, ours: Geometry) -> None:
        """Nothing: the layers of ours were checked when the transfer was asked for."""

    def moves_nothing(self, ours: Geometry) -> bool:
        """No: a layer has at least one tensor."""
        return False

    def select(self, src: Layout, dst: Layout) -> tuple[Layout, Layout]:
        """Both layouts cut to the layer. Raises LLM_PARAM_INVALID."""
        ours = src.tensors(pairs_of(range(self.src, self.src + 1), src.geometry.num_tensors))
        everything = dst.geometry.num_tensors
        theirs = pairs_of(range(self.dst, self.dst + 1), everything)
        if len(theirs) != ours.geometry.num_tensors:
            raise invalid(f"dst layer {self.dst} is out of range: {everything} remote tensors")
        return ours, dst.tensors(theirs)
