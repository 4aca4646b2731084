"""What a worker says of its KV memory to those who read it, and whether two fit.

It is read from the other end's memory, so it is checked like anything that came from outside.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from llm_datadist.integrations.vllm.groups import Kept  # noqa: TC001  # msgspec reads it

_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
_Size = Annotated[int, msgspec.Meta(ge=1, lt=2**62)]
_Text = Annotated[str, msgspec.Meta(max_length=1024)]


class GroupShape(msgspec.Struct, frozen=True):
    """A KV cache group."""

    kept: Kept
    span_tokens: _Count
    block_tokens: _Size


class RegionShape(msgspec.Struct, frozen=True):
    """Layers that are alike, and by which model ids their blocks are read."""

    group: _Count
    layers: list[_Text]
    form: _Text
    #: of a block: of one of its heads, where heads are told apart
    piece_nbytes: _Size
    #: whether heads are told apart, or all ranks have the same
    splits: bool
    #: blocks as they are
    whole: _Count
    #: token by token, by the plane's name
    planes: dict[_Text, _Count]


class RecordsShape(msgspec.Struct, frozen=True):
    """What it says of prompts while they are computed."""

    num_records: Annotated[int, msgspec.Meta(ge=1, le=2**16)]
    #: by group, the most blocks of one request
    num_blocks: list[Annotated[int, msgspec.Meta(ge=0, lt=2**32)]]


class Shape(msgspec.Struct, frozen=True):
    """The memory of one worker."""

    tp_size: _Size
    groups: list[GroupShape]
    regions: list[RegionShape]
    #: None: prompts are handed over when they are computed
    records: RecordsShape | None = None

    @property
    def layers(self) -> list[str]:
        """Of all regions; those that share the memory of one of these are not among them."""
        return [layer for region in self.regions for layer in region.layers]


def shape_of(said: object) -> Shape:
    """Reads what a worker says. Raises ValueError."""
    try:
        return msgspec.convert(said, Shape)
    except msgspec.ValidationError as error:
        raise ValueError(f"it does not say what its KV memory is like: {error}") from None


def misfits(ours: Shape, theirs: Shape) -> list[str]:
    """The fields in which the memories differ so that nothing can be read, in words."""
    kinds = [[[each.kept, each.span_tokens] for each in shape.groups] for shape in (theirs, ours)]
    if kinds[0] != kinds[1]:
        return [_differ("KV cache groups", *kinds)]
    found: dict[str, None] = {}
    for region in ours.regions:
        for other in theirs.regions:
            if set(region.layers) & set(other.layers):
                reason = _misfit(ours, region, theirs, other)
                if reason:
                    found[reason] = None
    return list(found)


def reads_whole(ours: Shape, region: RegionShape, theirs: Shape, other: RegionShape) -> bool:
    """Whether blocks of both are moved as they are; else token by token."""
    group, their_group = ours.groups[region.group], theirs.groups[other.group]
    if region.piece_nbytes != other.piece_nbytes:
        return False
    return group.kept == "state" or group.block_tokens == their_group.block_tokens


def _misfit(ours: Shape, region: RegionShape, theirs: Shape, other: RegionShape) -> str | None:
    if region.group != other.group:
        return _differ(f"KV cache group of {region.layers[0]}", other.group, region.group)
    if region.form != other.form:
        return _differ("form of KV blocks", other.form, region.form)
    if ours.tp_size != theirs.tp_size and not (region.splits and other.splits):
        return _differ(
            f"tensor parallel size ({region.layers[0]} is not split)", theirs.tp_size, ours.tp_size
        )
    if reads_whole(ours, region, theirs, other):
        return None
    group, their_group = ours.groups[region.group], theirs.groups[other.group]
    sizes = their_group.block_tokens, group.block_tokens
    if sizes[0] == sizes[1]:
        return _differ("bytes of a KV block", other.piece_nbytes, region.piece_nbytes)
    if not region.planes or region.planes.keys() != other.planes.keys():
        return _differ("block size (tokens are not told apart)", *sizes)
    if group.kept != "all" and sizes[0] % sizes[1]:
        # of our first block they may have freed the beginning
        return _differ("block size (of a window, theirs must be a multiple)", *sizes)
    return None


def _differ(field: str, theirs: object, ours: object) -> str:
    return f"{field}: {theirs} there, {ours} here"
