"""Lookup: finding a peer's cache by id or key, by asking its owner or in a table kept per link."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from llm_datadist.core import messages as m
from llm_datadist.core.registry import KeyName
from llm_datadist.core.remote import RemoteCache, RemoteTable, understand
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.running.bell import WAKE, TurnInVain, Turns
from llm_datadist.transport.stream import RequestRefused

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llm_datadist.peer.streams import StreamPool
    from llm_datadist.running.deadline import Deadline


#: requests have keys of their own, and some are never used up
_MOST_ANSWERS = 1024


class Found(NamedTuple):
    """A peer's cache and the row that was meant; `is_fresh` when its owner said so just now."""

    cache: RemoteCache
    row: int
    is_fresh: bool


class Lookup:
    """The caches of one peer. Thread-safe.

    In remote-accessible mode (`is_tabled`) the owner's table, of all that peers may reach, is
    fetched once, and again when something is missing from it or proved stale. In two-sided mode the
    owner is asked; where it checks claims with each read (`remembers`), its answer is kept until a
    read proves it stale.
    """

    def __init__(self, streams: StreamPool, *, is_tabled: bool, remembers: bool) -> None:
        self._streams = streams
        self._is_tabled = is_tabled
        self._remembers = remembers
        self._fetching = Turns()
        self._table: RemoteTable | None = None
        self._answers: dict[int | KeyName, Found] = {}

    def find(self, name: int | KeyName, deadline: Deadline) -> Found:
        """The cache and the row that an id (row 0) or a key names.

        Raises LLMException: LLM_KV_CACHE_NOT_EXIST, LLM_TIMEOUT, LLM_NOT_YET_LINK.
        """
        if not self._is_tabled:
            if self._remembers:
                return self._answers.get(name) or self._ask_and_remember(name, deadline)
            return self._ask(name, deadline)
        table = self._table
        found = None if table is None else _find_in(table, name, is_fresh=False)
        if found is None:
            found = _find_in(self._fetch(table, deadline), name, is_fresh=True)
        if found is None:  # its owner may have it to itself, and then says so
            found = self._ask(name, deadline)
        return found

    def table(self, deadline: Deadline, seen: RemoteTable | None = None) -> RemoteTable:
        """All that peers may reach there, as it is known here; newer than `seen`.

        Raises LLMException: LLM_TIMEOUT, LLM_NOT_YET_LINK.
        """
        table = self._table
        return self._fetch(seen, deadline) if table is None or table is seen else table

    def forget(self) -> None:
        """What was found proved stale."""
        self._table = None
        self._answers = {}

    def _ask_and_remember(self, name: int | KeyName, deadline: Deadline) -> Found:
        cache, row, _ = self._ask(name, deadline)
        if isinstance(name, KeyName):
            cache = cache.claimed(name, row)
        if not cache.has_key_at(row):  # else the pull uses it up
            if len(self._answers) >= _MOST_ANSWERS:
                self._answers = {}
            self._answers[name] = Found(cache, row, is_fresh=False)
        return Found(cache, row, is_fresh=True)

    def _ask(self, name: int | KeyName, deadline: Deadline) -> Found:
        if isinstance(name, KeyName):
            question = m.Resolve(None, name.id, name.model_id, name.is_prefix)
        else:
            question = m.Resolve(name, 0, 0, False)
        with self._streams.borrow(deadline) as stream:
            try:
                answer = stream.ask(question, deadline)
            except RequestRefused as refused:
                if refused.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST:
                    raise _missing(name) from refused
                raise
        if not isinstance(answer, m.Resolved):
            raise _garbage(answer)
        return Found(_understand(answer.info), answer.row, is_fresh=True)

    def _fetch(self, seen: RemoteTable | None, deadline: Deadline) -> RemoteTable:
        """A table newer than `seen`; threads that miss at the same time share one fetch."""
        turn, ringing = object(), map(WAKE, self._fetching.bell.waiting)
        try:
            with suppress(TurnInVain):  # the fetch of this thread that it has interrupted
                self._fetching.take(turn, deadline, "waiting for the peer's table")
            if self._table is not None and self._table is not seen:
                return self._table
            with self._streams.borrow(deadline) as stream:
                answer = stream.ask(m.ListCaches(), deadline)
            if not isinstance(answer, m.Caches):
                raise _garbage(answer)
            self._table = RemoteTable(self._understood(answer.infos, deadline))
            return self._table
        finally:  # as `Turns.leave`, which a signal could come before: each of these is one step
            try:
                self._fetching.calls.pop(turn, None)
            finally:
                any(ringing)

    def _understood(
        self, infos: Sequence[m.CacheInfo], deadline: Deadline
    ) -> Iterator[RemoteCache]:
        """A table is as long as its owner likes; our call is not, nor is a link that was cut."""
        for info in infos:
            deadline.require("reading the peer's table")
            if self._streams.is_closed:
                raise LLMException("the link was cut", LLMStatusCode.LLM_NOT_YET_LINK)
            yield _understand(info)


def _find_in(table: RemoteTable, name: int | KeyName, *, is_fresh: bool) -> Found | None:
    if isinstance(name, KeyName):
        found = table.find_key(name)
        return None if found is None else Found(*found, is_fresh)
    cache = table.find(name)
    return None if cache is None else Found(cache, 0, is_fresh)


def _missing(name: int | KeyName) -> LLMException:
    what = "cache with that key" if isinstance(name, KeyName) else f"cache {name}"
    return LLMException(
        f"the peer has no {what}: it must register or allocate one, and keep it while it is used",
        LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
    )


def _understand(info: m.CacheInfo) -> RemoteCache:
    try:
        return understand(info)
    except m.ProtocolError as error:
        raise _garbage(error) from error


def _garbage(what: object) -> LLMException:
    return LLMException(f"the peer answered {what!r:.200}", LLMStatusCode.LLM_FAILED)
