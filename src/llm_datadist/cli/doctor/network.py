"""Where a cluster would listen, and who would be let in."""

from __future__ import annotations

import errno
import json
import os
import ssl
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from llm_datadist.cli.doctor.finding import Case, Finding, State
from llm_datadist.errors import LLMException
from llm_datadist.link_security import LinkSecurity
from llm_datadist.links.listener import bind
from llm_datadist.options import PATH_VARIABLE, SECURITY_VARIABLE, check_transfer_path
from llm_datadist.transport.shield import tls_context

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.cli.doctor.finding import Data

_DAY_S = 24 * 60 * 60
#: a certificate that ends sooner has to be renewed now
_SOON_DAYS = 14
_SECURITY = "link security"
_GUIDE = "docs/security.md says what it may be"


def listening(case: Case) -> Iterator[Finding]:
    """Whether the address can be had, and is not open to strangers."""
    name, listen = "listening", case.listen
    if listen is None:
        remedy = "--listen IP:PORT tries the address of LLMConfig.listen_ip_info"
        yield Finding(name, State.NOTE, "not tried: no address given", remedy)
        return
    data: Data = {"endpoint": str(listen), "is_loopback": listen.is_loopback}
    try:
        bind(listen).close()
    except LLMException as error:
        cause = error.__cause__
        is_taken = isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE
        remedy = f"ss -ltnp sport = :{listen.port} shows who has it" if is_taken else ""
        yield Finding(name, State.PROBLEM, str(error), remedy, data)
        return
    if listen.is_loopback or os.environ.get(SECURITY_VARIABLE):
        yield Finding(name, State.OK, f"{listen} can be had", data=data)
        return
    found = f"{listen} can be had, and whoever reaches it can link and read what is registered"
    remedy = f"set {SECURITY_VARIABLE}, or LLMConfig.link_security (docs/security.md)"
    yield Finding(name, State.PROBLEM, found, remedy, data)


def allowed_path(_: Case) -> Iterator[Finding]:
    """What the environment says of paths."""
    name, path = "allowed paths", os.environ.get(PATH_VARIABLE) or "auto"
    try:
        check_transfer_path(PATH_VARIABLE, path)
    except LLMException as error:
        yield Finding(name, State.PROBLEM, str(error), f"unset {PATH_VARIABLE}")
        return
    if path == "auto":
        yield Finding(name, State.OK, "all: each link takes its best one", data={"path": path})
        return
    found = f"{path} only, by {PATH_VARIABLE}"
    yield Finding(name, State.NOTE, found, f"unset {PATH_VARIABLE}", {"path": path})


def link_security(_: Case) -> Iterator[Finding]:
    """What the environment says of link security, and whether it can be used."""
    text = os.environ.get(SECURITY_VARIABLE)
    if not text:
        found = f"{SECURITY_VARIABLE} is not set: a cluster that sets none lets everybody in"
        yield Finding(_SECURITY, State.NOTE, found, "docs/security.md", {"kind": "none"})
        return
    try:
        security = LinkSecurity.parse(text, SECURITY_VARIABLE)
        if security.secret is None:
            yield _certificate(security)
        else:
            yield _secret(json.loads(text).get("secret_file"))
    except LLMException as error:
        yield Finding(_SECURITY, State.PROBLEM, str(error), f"no cluster starts with it: {_GUIDE}")


def _secret(file: str | None) -> Finding:
    data = {"kind": "secret"}
    if file is None:
        remedy = 'a file is better: {"secret_file": "/path"}'
        return Finding(_SECURITY, State.OK, "a shared secret, in the environment", remedy, data)
    return _kept(file) or Finding(_SECURITY, State.OK, f"a shared secret, in {file}", data=data)


def _certificate(security: LinkSecurity) -> Finding:
    """Has both ends of a link with this certificate shake hands. Raises LLMException."""
    if (finding := _kept(security.key)) is not None:
        return finding
    try:
        ends_at = _tls_ends_at(security)
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", "") or error.reason or str(error)
        found = f"{security.certificate} does not pass {security.ca}: {reason}"
        return Finding(_SECURITY, State.PROBLEM, found, "have that CA issue a new certificate")
    days = (ends_at - time.time()) / _DAY_S
    data: Data = {"kind": "tls", "days_left": round(days, 1)}
    found = f"mutual TLS; {security.certificate} or its CA ends in {days:.0f} days"
    if days < _SOON_DAYS:
        return Finding(
            _SECURITY, State.PROBLEM, found, "renew it now, and start the clusters anew", data
        )
    return Finding(_SECURITY, State.OK, found, data=data)


def _kept(file: str) -> Finding | None:
    """That everybody on this host can read what must be secret."""
    if not Path(file).stat().st_mode & stat.S_IROTH:
        return None
    found = f"every user of this host can read {file}"
    return Finding(_SECURITY, State.PROBLEM, found, f"chmod o-r {file}")


def _tls_ends_at(security: LinkSecurity) -> float:
    """When the certificate or the CA that signed it ends. Raises ssl.SSLError, LLMException."""
    to_caller, to_listener = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = tls_context(security, is_caller=True)
    caller = context.wrap_bio(to_caller, to_listener)
    listener = tls_context(security, is_caller=False).wrap_bio(
        to_listener, to_caller, server_side=True
    )
    for end in (caller, listener, caller):
        with suppress(ssl.SSLWantReadError):
            end.do_handshake()
    listener.do_handshake()
    certificate = caller.getpeercert() or {}
    chain = [certificate] + [
        ca for ca in context.get_ca_certs() if ca.get("subject") == certificate.get("issuer")
    ]
    return min(ssl.cert_time_to_seconds(str(each["notAfter"])) for each in chain)
