"""Lookup: finding a peer's cache by id or key, by asking its owner or in a table kept per link."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from llm_datadist.core import messages as m
from llm_datadist.core.registry import KeyName
from llm_datadist.core.remote import RemoteCache, RemoteTable, understand
from llm_datadist.errors import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from llm_datadist.engine.streams import StreamPool
    from llm_datadist.transport.deadline import Deadline


class Lookup:
    """The caches of one peer. Thread-safe.

    In two-sided mode the owner is asked each time. In remote-accessible mode (`is_tabled`) its
    whole table is fetched once, and again when something is missing from it or proved stale.
    """

    def __init__(self, streams: StreamPool, *, is_tabled: bool) -> None:
        self._streams = streams
        self._is_tabled = is_tabled
        self._fetching = threading.Lock()
        self._table: RemoteTable | None = None

    def find(self, name: int | KeyName, deadline: Deadline) -> tuple[RemoteCache, int]:
        """The cache and the row that an id (row 0) or a key names.

        Raises LLMException: LLM_KV_CACHE_NOT_EXIST, LLM_TIMEOUT, LLM_NOT_YET_LINK.
        """
        if not self._is_tabled:
            return self._ask(name, deadline)
        table = self._table
        found = None if table is None else _find_in(table, name)
        if found is None:
            found = _find_in(self._fetch(table, deadline), name)
        if found is None:
            raise LLMException(
                f"the peer has no cache named {name}", LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
            )
        return found

    def forget(self) -> None:
        """What was found proved stale."""
        self._table = None

    def _ask(self, name: int | KeyName, deadline: Deadline) -> tuple[RemoteCache, int]:
        if isinstance(name, KeyName):
            question = m.Resolve(None, name.id, name.model_id, name.is_prefix)
        else:
            question = m.Resolve(name, 0, 0, False)
        with self._streams.borrow(deadline) as stream:
            answer = stream.ask(question, deadline)
        if not isinstance(answer, m.Resolved):
            raise _garbage(answer)
        return _understand(answer.info), answer.row

    def _fetch(self, seen: RemoteTable | None, deadline: Deadline) -> RemoteTable:
        """A table newer than `seen`; threads that miss at the same time share one fetch."""
        if not self._fetching.acquire(timeout=deadline.require("waiting for the peer's table")):
            raise deadline.expired("waiting for the peer's table")
        try:
            if self._table is not None and self._table is not seen:
                return self._table
            with self._streams.borrow(deadline) as stream:
                answer = stream.ask(m.ListCaches(), deadline)
            if not isinstance(answer, m.Caches):
                raise _garbage(answer)
            self._table = RemoteTable(_understand(info) for info in answer.infos)
            return self._table
        finally:
            self._fetching.release()


def _find_in(table: RemoteTable, name: int | KeyName) -> tuple[RemoteCache, int] | None:
    if isinstance(name, KeyName):
        return table.find_key(name)
    cache = table.find(name)
    return None if cache is None else (cache, 0)


def _understand(info: m.CacheInfo) -> RemoteCache:
    try:
        return understand(info)
    except m.ProtocolError as error:
        raise _garbage(error) from error


def _garbage(what: object) -> LLMException:
    return LLMException(f"the peer answered {what!r:.200}", LLMStatusCode.LLM_FAILED)
