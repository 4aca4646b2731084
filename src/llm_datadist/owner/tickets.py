"""Tickets: what pushes run under, so that none is carried out when its call has ended.

A ticket is for the peer that the push is for: its number can be guessed, and others may be linked.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from llm_datadist.core.remote import Guard

if TYPE_CHECKING:
    from llm_datadist.core.generations import Generations
    from llm_datadist.core.geometry import Layout
    from llm_datadist.core.registry import Entry
    from llm_datadist.core.segments import U64
    from llm_datadist.running.gate import Gate


class Ticket(NamedTuple):
    """What a push runs under: a generation of its own, in a word of its own."""

    #: what the peer is told, and asks for: our cache under another id
    entry: Entry
    ours: Entry
    token: object
    #: who may read under it: a peer, as those know it who answer it
    reader: object
    #: the word; STALE in it ends the ticket
    cell: U64

    @property
    def guard(self) -> Guard:
        """What the peer must find unchanged."""
        return Guard.of(self.entry)

    def is_over(self, gate: Gate) -> bool:
        """Whether its call has ended, or is ending."""
        return self.token not in gate.running or int(self.cell[0]) != self.entry.generation


class Tickets:
    """Those of a cluster. The catalog's lock guards them."""

    def __init__(self, generations: Generations, gate: Gate) -> None:
        self._generations = generations
        self._gate = gate
        self._tickets: dict[int, Ticket] = {}
        #: no cache has such an id
        self._ids = itertools.count(-1, -1)

    def issue(
        self, token: object, ours: Entry, reader: object, pushed: Layout | None = None
    ) -> Ticket:
        """A ticket of the reader's for our cache, which holds as long as the token's call runs.

        `pushed` is the part of it that the peer may have, if that is not what it may reach anyway.
        """
        for old in list(self._tickets.values()):
            if old.is_over(self._gate) and self._tickets.pop(old.entry.cache_id, None) is not None:
                self._generations.close(old.entry.word_addr)
        word_addr, generation = self._generations.open()
        entry = replace(
            ours, cache_id=next(self._ids), word_addr=word_addr, generation=generation, keys={}
        )
        if pushed is not None:
            entry.layout, entry.is_remote_accessible = pushed, True
        ticket = Ticket(entry, ours, token, reader, self._generations.cell(word_addr))
        self._tickets[entry.cache_id] = ticket
        return ticket

    def find(self, ticket_id: int, reader: object) -> Ticket | None:
        """The ticket that holds; None for one that is over or another's, and for a cache's id."""
        ticket = self._tickets.get(ticket_id)
        if ticket is None or ticket.reader is not reader or ticket.is_over(self._gate):
            return None
        return ticket
