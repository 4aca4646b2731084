"""Authorities, and what they issue as files, as `link_security` takes them."""

from __future__ import annotations

import json
import ssl
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, NamedTuple

import trustme

if TYPE_CHECKING:
    from pathlib import Path


class Files(NamedTuple):
    """What one cluster has."""

    ca: Path
    certificate: Path
    key: Path

    def option(self, **others: Path) -> str:
        """The `link_security`, with other files in place of some."""
        files = {**self._asdict(), **others}
        return json.dumps({name: str(path) for name, path in files.items()})


class Authority:
    """A CA of its own."""

    def __init__(self) -> None:
        self._ca = trustme.CA()

    def issue(
        self,
        folder: Path,
        begins_in_s: float = -86400,
        ends_in_s: float = 86400,
        trusting: tuple[Authority, ...] = (),
        name: str = "cluster.example",
    ) -> Files:
        """A new certificate in a folder, in place of what is there; `trusting` further authorities.

        Each file is replaced in one step.
        """
        folder.mkdir(exist_ok=True)
        files = Files(*(folder / f"{name}.pem" for name in Files._fields))
        now = datetime.now(timezone.utc)
        leaf = self._ca.issue_cert(
            name,
            not_before=now + timedelta(seconds=begins_in_s),
            not_after=now + timedelta(seconds=ends_in_s),
        )
        cas = [authority._ca.cert_pem.bytes() for authority in (self, *trusting)]
        replace(files.ca, b"".join(cas))
        replace(files.certificate, b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        replace(files.key, leaf.private_key_pem.bytes())
        return files


def replace(file: Path, content: bytes) -> None:
    """As tools do that renew: readers see the file as it was, or as it is."""
    new = file.with_suffix(".new")
    new.unlink(missing_ok=True)
    new.touch(0o600)
    new.write_bytes(content)
    new.rename(file)


def contexts_of(files: Files | None, ca: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A caller's and a listener's, with files that `init` would refuse, or none."""
    made = []
    for protocol in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER):
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(ca)
        if files is not None:
            context.load_cert_chain(files.certificate, files.key)
        made.append(context)
    return made[0], made[1]
