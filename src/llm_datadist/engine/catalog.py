"""The catalog: this process's caches, as its own calls and its peers' requests see them."""

from __future__ import annotations

import secrets
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist.core import messages as m
from llm_datadist.core.generations import Generations
from llm_datadist.core.geometry import CacheKind, Geometry, Layout
from llm_datadist.core.registry import Entry, KeyName, Registry
from llm_datadist.core.remote import describe
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.transport.base import NONCE_NBYTES, ProbeNonce
from llm_datadist.transport.tcp import requested_columns
from llm_datadist.types import Placement

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llm_datadist.core.geometry import U64

_PROBE_ID = 0


class Catalog:
    """The registry behind a lock, and what peers may ask of it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._in_use: dict[int, int] = {}
        self._registry = Registry(Generations(secrets.randbits(62)), first_id=_PROBE_ID)
        self._nonce = ProbeNonce()
        geometry = Geometry(CacheKind.CONTINUOUS, 1, 1, NONCE_NBYTES)
        self._probe = self._registry.register(
            Layout.at(geometry, [self._nonce.addr]), Placement.HOST, (), is_remote_accessible=True
        )

    @property
    def probe_target(self) -> m.ProbeTarget:
        probe = self._probe
        return m.ProbeTarget(self._nonce.addr, self._nonce.nonce, probe.word_addr, probe.generation)

    def register(
        self,
        layout: Layout,
        placement: Placement,
        keys: Sequence[KeyName | None],
        *,
        is_remote_accessible: bool,
    ) -> Entry:
        with self._lock:
            return self._registry.register(
                layout, placement, keys, is_remote_accessible=is_remote_accessible
            )

    def unregister(self, cache_id: int, timeout_s: float) -> None:
        """Forgets a cache, once the transfers of this process that use its memory have ended.

        Raises LLMException(LLM_TIMEOUT) when they do not end; the cache then stays.
        """
        with self._lock:
            if not self._idle.wait_for(lambda: not self._in_use.get(cache_id), timeout_s):
                raise LLMException(
                    f"cache {cache_id} is still used by a transfer after {timeout_s:.3f} s",
                    LLMStatusCode.LLM_TIMEOUT,
                )
            if cache_id != _PROBE_ID:
                self._registry.unregister(cache_id)

    def close(self) -> None:
        """Makes all that peers know of this process stale."""
        with self._lock:
            for entry in list(self._registry.entries()):
                self._registry.unregister(entry.cache_id)

    @contextmanager
    def use(self, cache_id: int) -> Iterator[Entry]:
        """A cache of ours whose memory stays it meanwhile. Raises LLM_KV_CACHE_NOT_EXIST."""
        with self._lock:
            entry = self._find(cache_id)
            self._in_use[cache_id] = self._in_use.get(cache_id, 0) + 1
        try:
            yield entry
        finally:
            self._release(entry)

    def _release(self, entry: Entry) -> None:
        with self._lock:
            left = self._in_use[entry.cache_id] - 1
            if left:
                self._in_use[entry.cache_id] = left
            else:
                del self._in_use[entry.cache_id]
                self._idle.notify_all()

    def answer(self, request: m.Message) -> m.Message:
        """The answer to a peer's question. Raises LLMException to refuse it."""
        if isinstance(request, m.Resolve):
            return self._resolve(request)
        if isinstance(request, m.ListCaches):
            with self._lock:
                infos = [describe(e) for e in self._registry.entries() if e is not self._probe]
            return m.Caches(infos)
        raise m.ProtocolError(f"{type(request).__name__} is no request")

    def readable(self, read: m.Read) -> tuple[Entry, U64, U64]:
        """The memory that a peer asks to be sent: cache, addresses, lengths; all checked."""
        addrs, nbytes = requested_columns(read)
        with self._lock:
            entry = self._registry.find(read.cache_id)
        if entry.generation != read.generation:
            raise LLMException(
                f"cache {read.cache_id} was freed or changed", LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
            )
        if not entry.is_remote_accessible:
            raise invalid(f"cache {read.cache_id} is not registered as remote accessible")
        if not entry.layout.covers(addrs, nbytes):
            raise invalid(f"the read reaches beyond the tensors of cache {read.cache_id}")
        if float(nbytes.sum(dtype=np.float64)) > m.MAX_REQUEST_NBYTES:
            raise invalid(f"one read asks for more than {m.MAX_REQUEST_NBYTES} bytes")
        return entry, addrs, nbytes

    def _resolve(self, request: m.Resolve) -> m.Resolved:
        with self._lock:
            if request.cache_id is not None:
                entry, row = self._find(request.cache_id), 0
            else:
                key = KeyName(request.key_id, request.model_id, request.is_prefix)
                entry, row = self._registry.find_key(key)
            return m.Resolved(describe(entry), row)

    def _find(self, cache_id: int) -> Entry:
        if cache_id <= _PROBE_ID:
            raise LLMException(
                f"there is no cache {cache_id}", LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
            )
        return self._registry.find(cache_id)
