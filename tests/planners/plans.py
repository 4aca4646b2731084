"""A plan in the words in which planners can be compared: who reads which heads, and which bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable

#: from this address, to that one, so many bytes; addresses say which rank is meant
Moves: TypeAlias = "list[tuple[int, int, int]]"


class Edge(NamedTuple):
    """A head of a layer that a destination reads of a source, and its place at both ends."""

    source: int
    layer: int
    head: int
    src_place: int
    dst_place: int


class Plan(NamedTuple):
    """What one destination reads."""

    edges: frozenset[Edge]
    #: merged
    moves: Moves

    @property
    def sources(self) -> list[int]:
        """Who is read."""
        return sorted({edge.source for edge in self.edges})


def merged(moves: Iterable[tuple[int, int, int]]) -> Moves:
    """The same bytes in as few moves as they take, so that equal plans are equal lists."""
    found: Moves = []
    for src, dst, nbytes in sorted(moves):
        if found and (src, dst) == (found[-1][0] + found[-1][2], found[-1][1] + found[-1][2]):
            found[-1] = (*found[-1][:2], found[-1][2] + nbytes)
        else:
            found.append((src, dst, nbytes))
    return found


def spans(moves: Moves, end: int) -> list[tuple[int, int]]:
    """Which bytes of one end (0: the source) are moved, wherever they go."""
    alone = merged((move[end], move[end], move[2]) for move in moves)
    return [(addr, nbytes) for addr, _, nbytes in alone]
