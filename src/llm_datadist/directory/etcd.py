"""etcd (version 3) as a directory, over its JSON gateway: nothing but the standard library.

A member's record is the value of one key, `PREFIX/7`, and lies there under a lease of its ttl. A
new start of the cluster replaces it.
"""

from __future__ import annotations

from base64 import b64encode
from typing import TYPE_CHECKING, Any

from llm_datadist.directory.base import Announcement, DirectoryError, Superseded, Watch
from llm_datadist.directory.etcd_watch import EtcdWatch, entry_of
from llm_datadist.directory.gateway import Gateway
from llm_datadist.directory.place import Place, now_s
from llm_datadist.directory.record import Entry, Record, encode

if TYPE_CHECKING:
    import ssl

#: etcd counts a lease in whole seconds
_SHORTEST_LEASE_S = 2


class EtcdDirectory:
    """A prefix of keys in etcd: `EtcdDirectory("http://127.0.0.1:2379", "/my-fleet")`.

    Raises ValueError for a URL that is none of http or https. `tls` is for https, with a client's
    certificate if etcd asks for one; the system's authorities are trusted without it. `user` and
    `password` are for an etcd whose `auth` is enabled: that user needs to read and write the
    prefix. They are never logged; without TLS they travel as they are.
    """

    def __init__(
        self,
        url: str,
        prefix: str = "/llm-datadist",
        *,
        tls: ssl.SSLContext | None = None,
        user: str = "",
        password: str = "",
    ) -> None:
        self._gateway = Gateway(url, tls, user, password)
        self._prefix = prefix.rstrip("/") + "/"

    def __str__(self) -> str:
        return f"etcd at {self._gateway.url}, {self._prefix}"

    def announce(self, record: Record, ttl_s: float) -> Announcement:
        """Puts the record there, under a lease. As `Directory.announce`."""
        return _Key(self._gateway, self._prefix, Entry(record=record, ttl_s=ttl_s))

    def watch(self) -> Watch:
        """As `Directory.watch`."""
        return EtcdWatch(self._gateway, self._prefix)


class _Key:
    """The key of one member. An `Announcement`."""

    def __init__(self, gateway: Gateway, prefix: str, entry: Entry) -> None:
        self._gateway = gateway
        self._key = b64encode(f"{prefix}{entry.record.cluster_id}".encode()).decode()
        self._entry = entry
        self._place = Place(entry)
        self._lease = ""
        encode(entry)  # what cannot be written is said before anything is
        self._put(entry)

    def renew(self) -> None:
        """As `Announcement.renew`: keeps the lease alive, and looks whose key it is."""
        revision, lease = self._look()
        if lease != self._lease or not self._has_renewed():
            self._put(self._entry, revision)

    def change(self, record: Record) -> None:
        """As `Announcement.change`."""
        revision, _ = self._look()
        self._entry = Entry(record=record, ttl_s=self._entry.ttl_s)
        self._put(self._entry, revision)

    def withdraw(self) -> None:
        """Leaves a last word there, which goes with its lease."""
        revision, _ = self._look()
        record, ttl_s = self._entry.record, self._entry.ttl_s
        self._put(Entry(record=record, ttl_s=ttl_s, has_left=True), revision)

    def close(self) -> None:
        """As `Announcement.close`: nothing is held."""

    def _look(self) -> tuple[str, str]:
        """Which revision of the key is there ("0": none), and its lease.

        Raises Superseded when it is another start's.
        """
        found = self._gateway.ask("/v3/kv/range", {"key": self._key}).get("kvs") or [{}]
        pair, entry, now = found[0], entry_of(found[0]), now_s()
        there = entry if isinstance(entry, Entry) else None
        # what has a lease is renewed as long as it is there
        if rival := self._place.rival(there, None if there is None else now, now):
            raise Superseded(f"{rival} has announced itself in {self._gateway.url}")
        is_mine = there is not None and not there.has_left
        return str(pair.get("mod_revision", 0)), str(pair.get("lease", "")) if is_mine else ""

    def _has_renewed(self) -> bool:
        said = self._gateway.ask("/v3/lease/keepalive", {"ID": self._lease}).get("result")
        return isinstance(said, dict) and int(said.get("TTL") or 0) > 0

    def _put(self, entry: Entry, revision: str | None = None) -> None:
        """Under a lease of its own; only while that revision of the key is there, if one is named.

        Raises DirectoryError, also when somebody was quicker.
        """
        lease_s = max(_SHORTEST_LEASE_S, round(entry.ttl_s))
        lease = self._gateway.ask("/v3/lease/grant", {"TTL": lease_s}).get("ID")
        if not isinstance(lease, str):
            raise DirectoryError(f"etcd at {self._gateway.url} gave no lease")
        value = b64encode(encode(entry)).decode()
        put = {"key": self._key, "value": value, "lease": lease}
        compare = {"key": self._key, "target": "MOD", "mod_revision": revision}
        body: dict[str, Any] = {
            "compare": [] if revision is None else [compare],
            "success": [{"request_put": put}],
        }
        if not self._gateway.ask("/v3/kv/txn", body).get("succeeded"):
            raise DirectoryError(f"the record in etcd at {self._gateway.url} has just changed")
        before, self._lease = self._lease, lease
        if before:
            self._gateway.ask("/v3/lease/revoke", {"ID": before}, is_optional=True)
