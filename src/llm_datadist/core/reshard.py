"""Resharding: from layouts of the same KV cache to who reads which bytes of whom.

`reshard` compares layouts once, and gives a few patterns (`core/pattern.py`): these layers and
these heads of that source go there. Each head of each layer is taken from the first source that has
it, so what several hold is read once, and what none holds is refused. `common` is the pusher's view
of the same: what one source has of a destination, of which others bring the rest.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Final

from llm_datadist.core.pattern import HeadRun, Pattern, Windows, joined
from llm_datadist.core.segments import Segments
from llm_datadist.errors import LLMException, invalid

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llm_datadist.core.combs import Pieces
    from llm_datadist.core.segments import U64
    from llm_datadist.core.strips import Tokens
    from llm_datadist.kv_layout import KVLayout, LayerName

#: so many exist at a time of a plan: 6 MiB of them
MOST_SEGMENTS: Final = 2**18


def reshard(sources: Sequence[KVLayout], destination: KVLayout) -> tuple[Pattern, ...]:
    """What fills every byte of the destination's tokens exactly once: so much of each source.

    Sources that are not needed have no pattern. The order of sources is the order of preference.

    Raises LLMException (LLM_PARAM_INVALID), naming the axis and both values, where elements or
    heads differ in kind, and where no source has a layer or a head that the destination has.
    """
    return _reshard(tuple(sources), destination)


@lru_cache(maxsize=256)
def common(source: KVLayout, destination: KVLayout) -> Pattern:
    """What a source has of a destination, each byte of that once; all else is others' to bring.

    Raises LLMException (LLM_PARAM_INVALID), naming the axis and both values, where elements or
    heads differ in kind, and where they have no layer or no head in common.
    """
    _check_alike(0, source, destination)
    places = {name: place for place, name in enumerate(source.layers)}
    layers = [
        (places[name], place) for place, name in enumerate(destination.layers) if name in places
    ]
    if not layers:
        raise invalid(
            f"axis L (layers): the source has {_some(source.layers)}, the destination "
            f"{_some(destination.layers)}, and none of them is the same"
        )
    theirs, ours = source.heads, destination.heads
    first, stop = max(theirs.first, ours.first), min(theirs.stop, ours.stop)
    if first >= stop:
        raise invalid(
            f"axis H (KV heads): the source has heads {theirs}, the destination {ours}, and none "
            "of them is the same"
        )
    run = HeadRun(0, first - theirs.first, first - ours.first, stop - first)
    return Pattern(source, destination, run, *zip(*layers, strict=True))


def planned(
    patterns: Sequence[Pattern],
    src_addrs: U64,
    src_blocks: Sequence[int],
    dst_addrs: U64,
    dst_blocks: Sequence[int],
    tokens: Tokens,
) -> Pieces | Windows:
    """What one source's patterns move of a request: at once, or, if it is much, by windows.

    Raises as `Pattern.segments` does.
    """
    blocks = src_blocks, dst_blocks, tokens
    grids = [g for each in patterns for g in each.grids(*blocks, src_addrs, dst_addrs)]
    windows = Windows(grids, MOST_SEGMENTS)
    if len(windows) > MOST_SEGMENTS:
        return windows
    made = list(windows)
    segments = [window for window in made if isinstance(window, Segments)]
    if len(segments) == len(made):
        return joined(segments)
    return made[0] if len(made) == 1 else windows


def check_alike(source: KVLayout, destination: KVLayout) -> None:
    """Raises LLM_PARAM_INVALID unless blocks of some layers may go as they are."""
    ends = [
        replace(end, layers=(0,), num_blocks=1) if "L" not in end.order else end
        for end in (source, destination)
    ]
    if ends[0] != ends[1]:
        raise invalid(
            "the caches have layouts that differ, so their layers are matched by name: give no "
            "layer ranges"
        )


def no_tokens() -> LLMException:
    """For tokens that are asked for of caches which do not say where theirs lie."""
    return invalid("tokens are counted between caches with layouts: register both with one")


@lru_cache(maxsize=256)
def _reshard(sources: tuple[KVLayout, ...], destination: KVLayout) -> tuple[Pattern, ...]:
    for index, source in enumerate(sources):
        _check_alike(index, source, destination)
    pairs: dict[HeadRun, list[tuple[int, int]]] = {}
    places = [{name: place for place, name in enumerate(each.layers)} for each in sources]
    for dst_layer, name in enumerate(destination.layers):
        holders = [index for index, names in enumerate(places) if name in names]
        for run in _head_runs(name, holders, sources, destination):
            pairs.setdefault(run, []).append((places[run.source][name], dst_layer))
    return tuple(
        Pattern(sources[run.source], destination, run, *zip(*layers, strict=True))
        for run, layers in pairs.items()
    )


def _head_runs(
    layer: LayerName, holders: Sequence[int], sources: Sequence[KVLayout], destination: KVLayout
) -> Iterator[HeadRun]:
    """From whom which of the destination's heads of one layer come."""
    heads = destination.heads
    if not holders:
        raise invalid(
            f"axis L (layers): the destination has layer {_shown(layer)}, and no source does; "
            f"they have {_some({name: None for source in sources for name in source.layers})}"
        )
    head = heads.first
    while head < heads.stop:
        source = next(
            (i for i in holders if sources[i].heads.first <= head < sources[i].heads.stop), None
        )
        if source is None:
            held = ", ".join(str(sources[i].heads) for i in holders)
            raise invalid(
                f"axis H (KV heads): the destination has head {head} of {heads.of}, and no source "
                f"has it in layer {_shown(layer)}; they have {held}"
            )
        theirs = sources[source].heads
        stop = min(theirs.stop, heads.stop)
        yield HeadRun(source, head - theirs.first, head - heads.first, stop - head)
        head = stop


def _check_alike(index: int, source: KVLayout, destination: KVLayout) -> None:
    ends = source, destination
    for what, theirs, ours in (
        (
            "axis H (KV heads)",
            *("no heads, but a latent vector" if e.is_latent else "heads" for e in ends),
        ),
        ("axis H (KV heads of the model)", source.heads.of, destination.heads.of),
        ("axis D (head size)", source.head_size, destination.head_size),
        ("data type", source.data_type.name, destination.data_type.name),
    ):
        if theirs != ours:
            raise invalid(f"{what}: source {index} has {theirs}, the destination {ours}")


def _some(names: Sequence[LayerName] | dict[LayerName, None], most: int = 6) -> str:
    shown = [_shown(name) for name in islice(names, most)]
    return ", ".join([*shown, "…"] if len(names) > most else shown)


def _shown(name: LayerName, most: int = 80) -> str:
    """A peer's layers have the names that it gives them."""
    text = repr(name)
    return text if len(text) <= most else f"{text[: most - 1]}…"
