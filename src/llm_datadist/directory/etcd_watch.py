"""Watching a prefix of etcd: a list of what is there, then a stream of what changes."""

from __future__ import annotations

import time
from base64 import b64decode, b64encode
from typing import TYPE_CHECKING, Any, Final

from llm_datadist.directory.base import DirectoryError
from llm_datadist.directory.complaints import Complaints
from llm_datadist.directory.members import MAX_MEMBERS, Members
from llm_datadist.directory.record import Entry, decode
from llm_datadist.directory.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llm_datadist.directory.base import Changes
    from llm_datadist.directory.gateway import Gateway

_PAGE: Final = 1000
#: etcd counts the time of leases: here an entry lasts until it says otherwise
_NEVER: Final = 1e12


class EtcdWatch:
    """Who has a key there. A `Watch`.

    etcd says when a lease has run out, so nobody's ttl is measured here before a key has gone.
    """

    def __init__(self, gateway: Gateway, prefix: str) -> None:
        self._gateway = gateway
        self._prefix = prefix
        self._members = Members()
        self._complaints = Complaints(f"etcd at {gateway.url}")
        self._stream = Stream()
        self._is_open = False

    def wait(self, timeout_s: float) -> Changes:
        """As `Watch.wait`."""
        end = time.monotonic() + timeout_s
        try:
            if not self._is_open:
                self._open()
            while True:
                now = time.monotonic()
                for _ in self._members.overdue(now):
                    pass  # nobody wrote it again
                changes = self._members.take()
                if changes or self._stream.is_interrupted or now >= end:
                    return changes
                self._listen(min(end, self._members.next_at or end))
        except DirectoryError:
            self._shut()
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            # the last ones: an answer of another shape, whose rest would be missed
            self._shut()
            raise DirectoryError(f"etcd at {self._gateway.url}: {error!r:.200}") from error

    def interrupt(self) -> None:
        """As `Watch.interrupt`."""
        self._stream.interrupt()

    def close(self) -> None:
        """As `Watch.close`."""
        self._shut()
        self._stream.close()

    def _shut(self) -> None:
        self._is_open = False
        self._stream.disconnect()

    def _open(self) -> None:
        """Lists all keys, and begins to listen behind that."""
        revision = self._list()
        first, last = _range_of(self._prefix)
        create = {"key": first, "range_end": last, "start_revision": str(revision + 1)}
        self._stream.connect(self._gateway, "/v3/watch", {"create_request": create})
        self._is_open = True

    def _list(self) -> int:
        """All that is there, page by page; the revision that it is of."""
        first, last = _range_of(self._prefix)
        revision, seen = 0, set[int]()
        more = True
        while more and len(seen) < MAX_MEMBERS:
            body: dict[str, Any] = {"key": first, "range_end": last, "limit": _PAGE}
            if revision:
                body["revision"] = revision
            page = self._gateway.ask("/v3/kv/range", body)
            revision = revision or int(page["header"]["revision"])
            pairs = page.get("kvs") or []
            heard = map(self._heard, pairs)
            seen.update(cluster_id for cluster_id in heard if cluster_id is not None)
            more = bool(page.get("more")) and bool(pairs)
            if more:
                first = b64encode(b64decode(pairs[-1]["key"]) + b"\0").decode()
        for cluster_id in set(self._members.ids()) - seen:
            self._missing(cluster_id)
        return revision

    def _listen(self, until: float) -> None:
        for said in self._stream.receive(until):
            result = said.get("result")
            if not isinstance(result, dict) or result.get("canceled"):
                raise DirectoryError(f"etcd at {self._gateway.url} ended the watch: {said!r:.200}")
            for event in result.get("events") or ():
                pair = event.get("kv") or {}
                if event.get("type", "PUT") == "PUT":
                    self._heard(pair)
                else:
                    self._missing(self._id_of(pair))

    def _heard(self, pair: Mapping[str, Any]) -> int | None:
        """Takes what a key says; its cluster id, if it is a member's."""
        cluster_id, entry = self._id_of(pair), entry_of(pair)
        if cluster_id is None:
            return None
        if isinstance(entry, Entry) and entry.record.cluster_id != cluster_id:
            entry = ValueError(f"it is cluster {entry.record.cluster_id}'s")
        if isinstance(entry, ValueError):
            self._complaints.add(f"{self._prefix}{cluster_id}", str(entry))
            return None
        self._members.heard(entry, _NEVER)
        return cluster_id

    def _missing(self, cluster_id: int | None) -> None:
        """Its lease ran out, or etcd has lost it: it has a ttl to appear again."""
        if cluster_id is not None:
            self._members.missing(cluster_id, time.monotonic())

    def _id_of(self, pair: Mapping[str, Any]) -> int | None:
        try:
            key = b64decode(pair.get("key", "")).decode()
        except ValueError:
            return None
        digits = key.removeprefix(self._prefix)
        if not (digits.isascii() and digits.isdigit()) or len(digits) > 20:
            return None
        return int(digits) if str(int(digits)) == digits else None


def entry_of(pair: Mapping[str, Any]) -> Entry | ValueError:
    """The entry that is a key's value, or why it is none."""
    try:
        return decode(b64decode(pair.get("value", "")))
    except ValueError as error:
        return error


def _range_of(prefix: str) -> tuple[str, str]:
    """All keys that begin with it, as etcd takes ranges."""
    first = prefix.encode()
    last = first[:-1] + bytes([first[-1] + 1])
    return b64encode(first).decode(), b64encode(last).decode()
