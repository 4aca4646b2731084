"""KVLayout: which part of a model's KV cache some tensors hold, and how it lies in them.

An addition to the reference. One rule describes what engines do: a tensor is an *order of named
axes*, outermost first, and a stride for each.

| axis | counts |
| -- | -- |
| L | layers |
| K | K and V |
| B | blocks |
| H | KV heads |
| N | tokens of a block |
| D | elements of a head |

What L and K do not count inside a tensor is counted by tensors: without both, a cache is one tensor
for K of layer 0, one for V of layer 0, one for K of layer 1 and so on. Without B the blocks are
outermost, so HND is BHND. C is K and D in one: K of a head and token with V behind it. Without H
the cache has no heads, but one latent vector a token (MLA), and K and V are not told apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Final, TypeAlias, final

from llm_datadist.checks import INT64_MAX, check_int, check_sequence, check_type
from llm_datadist.errors import invalid
from llm_datadist.types import DataType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.types import CacheDesc

#: a layer by its number or by its name; both ends call it the same
LayerName: TypeAlias = "int | str"

AXES: Final = {
    "L": "layers",
    "K": "K and V",
    "B": "blocks",
    "H": "KV heads",
    "N": "tokens of a block",
    "D": "head size",
}


@final
@dataclass(frozen=True, slots=True)
class KVHeads:
    """The KV heads that a cache holds: `count` of the model's `of`, from head `first` on.

    Raises TypeError; LLMException (LLM_PARAM_INVALID) for heads that the model does not have.
    """

    first: int
    count: int
    of: int

    def __post_init__(self) -> None:
        for name in ("first", "count", "of"):
            check_type(f"KVHeads.{name}", getattr(self, name), int)
        if self.first < 0 or self.count < 1 or not self.stop <= self.of <= INT64_MAX:
            raise invalid(f"a model of {self.of} KV heads has no heads {self}")

    def __str__(self) -> str:
        return f"{self.first} to {self.stop - 1} of {self.of}"

    @classmethod
    def all(cls, of: int) -> KVHeads:
        """All heads of a model."""
        return cls(0, of, of)

    @classmethod
    def share(cls, of: int, rank: int, ranks: int) -> KVHeads:
        """What one of `ranks` tensor-parallel ranks holds: an equal share, or, where there are
        fewer heads than ranks, one head, which the ranks beside it hold as well.

        Raises LLMException (LLM_PARAM_INVALID) when the one number does not divide the other.
        """
        if not 0 <= rank < ranks:
            raise invalid(f"there is no rank {rank} of {ranks}")
        if max(of, ranks) % min(of, ranks):
            raise invalid(f"{of} KV heads are not shared equally by {ranks} ranks")
        return cls(rank * of // ranks, max(1, of // ranks), of)

    @property
    def stop(self) -> int:
        """The first head behind them."""
        return self.first + self.count


@final
@dataclass(frozen=True, slots=True)
class KVLayout:
    """What the tensors of a blocks cache hold, and where in them. A value; see the module.

    Mostly made by `KVLayout.of` or `of_tensor`. Equal layouts are equal in each byte's place. All
    tensors of a cache are alike. Raises TypeError; LLMException (LLM_PARAM_INVALID) for a layout
    that cannot be, or in which two elements would lie at one place.
    """

    #: the layers held, in the order in which they lie
    layers: tuple[LayerName, ...]
    heads: KVHeads
    num_blocks: int
    #: tokens in a block
    block_tokens: int
    #: elements of one head and token of K, or of V; of the whole latent vector
    head_size: int
    data_type: DataType
    #: axes, outermost first; C is written out as KD, or D
    order: str
    #: bytes from one to the next of each axis in `order`; 0 where there is only one. Left out: the
    #: tensors have no gaps
    strides: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_type("data_type", self.data_type, DataType)
        for name in ("num_blocks", "block_tokens", "head_size"):
            if check_type(name, getattr(self, name), int) < 1:
                raise invalid(f"{name} must be at least 1, got {getattr(self, name)}")
        for layer in check_type("layers", self.layers, tuple):
            check_type("a layer", layer, int, str)
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise invalid("layers must name one layer at least, and none of them twice")
        if not _is_order(self.order):
            raise invalid(f"order must have each of {', '.join(AXES)} at most once, and B, N and D")
        if self.is_latent and self.heads != KVHeads.all(1):
            raise invalid(f"a cache without the axis H is latent: it has no heads {self.heads}")
        object.__setattr__(self, "strides", self._checked_strides())

    @classmethod
    def of(
        cls,
        desc: CacheDesc,
        order: str,
        *,
        heads: KVHeads | None = None,
        layers: Sequence[LayerName] | None = None,
    ) -> KVLayout:
        """The layout of a cache of contiguous tensors. `order` names the dims of `desc.shape`.

        `heads`: which of the model's heads they are; left out, all. `layers`: which layers; left
        out, 0 and up. Raises as the class does, and for what does not fit the shape.
        """
        return cls.of_tensor(
            desc.shape, _dense(desc.shape, 1), desc.data_type, order,
            num_tensors=desc.num_tensors, heads=heads, layers=layers,
        )  # fmt: skip

    @classmethod
    def of_tensor(
        cls,
        shape: Sequence[int],
        strides: Sequence[int],
        data_type: DataType,
        order: str,
        *,
        num_tensors: int = 1,
        heads: KVHeads | None = None,
        layers: Sequence[LayerName] | None = None,
    ) -> KVLayout:
        """The layout of tensors with that shape, and strides in elements, as torch has them.

        `order` names the dims of `shape`. For all else see `of`.
        """
        letters = check_type("order", order, str)
        letters = letters if "B" in letters else f"B{letters}"
        dims = check_sequence("shape", tuple(shape), int)
        steps = check_sequence("strides", tuple(strides), int)
        if not len(letters) == len(dims) == len(steps):
            raise invalid(
                f"the order {letters} names {len(letters)} dims, the shape {tuple(dims)} has "
                f"{len(dims)} and there are {len(steps)} strides"
            )
        axes = {axis: (dim, step) for axis, dim, step in zip(letters, dims, steps, strict=True)}
        is_latent = "H" not in axes
        if "C" in axes:
            letters = letters.replace("C", "D" if is_latent else "KD")
            axes |= _split_content(*axes.pop("C"), 1 if is_latent else 2)
        if not _is_order(letters):
            raise invalid(f"{order} is no order of the axes {', '.join(AXES)} (or C in place of D)")
        num_kv = 1 if is_latent else 2
        if "K" in axes and axes["K"][0] != num_kv:
            raise invalid(f"the axis K counts K and V, which are {num_kv}, not {axes['K'][0]}")
        held = KVHeads.all(1 if is_latent else axes["H"][0]) if heads is None else heads
        if not is_latent and held.count != axes["H"][0]:
            raise invalid(f"the axis H has {axes['H'][0]} heads, and heads {held} are said")
        names = _layers(axes.get("L", (None, 0))[0], num_tensors, 1 if "K" in axes else num_kv)
        if layers is not None:
            if len(layers) != len(names):
                raise invalid(f"the tensors have {len(names)} layers, and {len(layers)} are named")
            names = tuple(layers)
        return cls(
            names, held, axes["B"][0], axes["N"][0], axes["D"][0], data_type, letters,
            tuple(axes[axis][1] * data_type.itemsize for axis in letters),
        )  # fmt: skip

    # -- what follows from it --

    @property
    def is_latent(self) -> bool:
        """Whether it has no heads, but one latent vector a token (MLA)."""
        return "H" not in self.order

    @property
    def num_kv(self) -> int:
        """2 for K and V, 1 for a latent cache."""
        return 1 if self.is_latent else 2

    @property
    def num_tensors(self) -> int:
        """How many tensors it takes."""
        return (1 if "L" in self.order else len(self.layers)) * self._kv_tensors

    @property
    def nbytes(self) -> int:
        """The bytes of one tensor, from its first element to its last."""
        ends = ((self.size(a) - 1) * s for a, s in zip(self.order, self.strides, strict=True))
        return sum(ends) + self.data_type.itemsize

    def size(self, axis: str) -> int:
        """How many there are of an axis, in one tensor or in all of them."""
        sizes = {
            "L": len(self.layers), "K": self.num_kv, "B": self.num_blocks,
            "H": self.heads.count, "N": self.block_tokens, "D": self.head_size,
        }  # fmt: skip
        return sizes[axis]

    def stride(self, axis: str) -> int:
        """Bytes from one to the next of an axis in a tensor; 0 for one that tensors count."""
        return self.strides[self.order.index(axis)] if axis in self.order else 0

    def tensor(self, layer: int, kv: int) -> int:
        """Which tensor has K (`kv` 0) or V (1) of the layer at place `layer`."""
        step = self._kv_tensors
        return (0 if "L" in self.order else layer * step) + (kv if step > 1 else 0)

    def check_cache(self, num_tensors: int, tensor_nbytes: int) -> None:
        """Raises LLMException (LLM_PARAM_INVALID) unless it lies within such a cache."""
        if num_tensors != self.num_tensors:
            raise invalid(f"the layout has {self.num_tensors} tensors, the cache {num_tensors}")
        if tensor_nbytes < self.nbytes:
            raise invalid(
                f"the layout takes {self.nbytes} bytes of each tensor, the cache's have "
                f"{tensor_nbytes}"
            )

    # -- parts of the above --

    @property
    def _kv_tensors(self) -> int:
        return 1 if "K" in self.order else self.num_kv

    def _checked_strides(self) -> tuple[int, ...]:
        itemsize, sizes = self.data_type.itemsize, [self.size(axis) for axis in self.order]
        strides = check_type("strides", self.strides, tuple) or _dense(sizes, itemsize)
        if len(strides) != len(sizes):
            raise invalid(f"{len(strides)} strides for the axes {self.order}")
        # of one alone nothing depends on the stride, and engines say anything
        strides = tuple(
            check_int("a stride", stride, 0, INT64_MAX) if size > 1 else 0
            for stride, size in zip(strides, sizes, strict=True)
        )
        end = itemsize
        for stride, size, axis in sorted(zip(strides, sizes, self.order, strict=True)):
            if size > 1 and stride < end:
                raise invalid(
                    f"the axis {axis} has a stride of {stride} bytes, and what lies inside it "
                    f"takes {end}"
                )
            end += (size - 1) * stride
        if end > INT64_MAX:
            raise invalid("a tensor cannot have more than 2**63-1 bytes")
        return strides


def _dense(sizes: Sequence[int], step: int) -> tuple[int, ...]:
    """The strides of a tensor without gaps."""
    return tuple(accumulate(sizes[:0:-1], mul, initial=step))[::-1]


def _is_order(letters: str) -> bool:
    return set("BND") <= set(letters) <= set(AXES) and len(set(letters)) == len(letters)


def _split_content(size: int, stride: int, num_kv: int) -> dict[str, tuple[int, int]]:
    """K and D (size, stride) of an axis that has both."""
    if size % num_kv:
        raise invalid(f"the axis C has {size} elements, which are not as many of K as of V")
    head = {"D": (size // num_kv, stride)}
    return head if num_kv == 1 else {"K": (num_kv, size // num_kv * stride), **head}


def _layers(inside: int | None, num_tensors: int, kv_tensors: int) -> tuple[LayerName, ...]:
    """The numbers of the layers that so many tensors have, each of them `inside`, or a part."""
    if num_tensors % kv_tensors or (inside is not None and num_tensors != kv_tensors):
        whole = "one cache" if inside is not None else "whole layers"
        raise invalid(f"{num_tensors} tensors are not {whole} with {kv_tensors} of K and V")
    return tuple(range(num_tensors // kv_tensors if inside is None else inside))
