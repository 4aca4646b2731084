"""Certificates, keys and authorities of our own: read from their files, and tried at once.

Whatever is wrong with them is said when a cluster begins, in words of the files, and not by each
peer later. So both ends of a hand-shake are played here, in memory, with what the files hold.
"""

from __future__ import annotations

import ssl
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from llm_datadist.credential_file import is_public, read_credential
from llm_datadist.errors import invalid
from llm_datadist.observe.log import get_logger
from llm_datadist.system_errors import pass_on_handlers, refusals_ignored
from llm_datadist.transport import ktls, records
from llm_datadist.transport.certificate import Certificate, NamesNoCluster, fault_of

if TYPE_CHECKING:
    from llm_datadist.link_security import LinkSecurity

_NAME: Final = "link_security"
#: OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which Python has no name for
_NO_CHECK_TIME: Final = 0x200000
_TIMES: Final = (9, 10)  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED

#: the last for a key of another kind than the certificate's: OpenSSL sees two pairs, both by halves
_OTHER_KEY: Final = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")


class TlsContexts(NamedTuple):
    """What both ends of mutual TLS are made of. Thread-safe."""

    caller: ssl.SSLContext
    #: of connections that the kernel can seal, where it can seal any
    tcp_caller: ssl.SSLContext
    listener: ssl.SSLContext
    #: when the first of our certificate and those of `ca` that signed it ends, in Unix time
    ends_at: float


class _EncryptedKey(Exception):
    """A pass phrase would be needed."""


def load_tls(security: LinkSecurity) -> TlsContexts:
    """What the files hold, once it has passed a hand-shake with itself.

    Raises LLMException (LLM_PARAM_INVALID), with what is wrong with which file. Asks nobody for a
    pass phrase, and waits for no file.
    """
    for file, kind in (
        (security.ca, "CERTIFICATE"),
        (security.certificate, "CERTIFICATE"),
        (security.key, "PRIVATE KEY"),
    ):
        if f"{kind}-----".encode() not in read_credential(_NAME, file):
            what = "private key" if kind == "PRIVATE KEY" else "certificate"
            raise invalid(f"{_NAME}: {file} holds no {what} in PEM format")
    ours = [] if records.why_not() else [records.PROTOCOL]
    either = ours if ktls.why_not() else [ktls.PROTOCOL, *ours]
    caller = _context(security, ssl.PROTOCOL_TLS_CLIENT, ours)
    tcp_caller = caller
    if either != ours:
        tcp_caller = _context(security, ssl.PROTOCOL_TLS_CLIENT, either)
    listener = _context(security, ssl.PROTOCOL_TLS_SERVER, either)
    try:
        certificate = _rehearse(caller, listener)
    except ssl.SSLCertVerificationError as error:
        raise invalid(f"{_NAME}: {_blame(error, security, caller, listener)}") from None
    except ssl.SSLError as error:
        reason = error.reason or error
        raise invalid(f"{_NAME}: TLS does not work with {security.certificate}: {reason}") from None
    except NamesNoCluster as error:
        raise invalid(f"{_NAME}: the certificate {security.certificate} {error}") from None
    issuers = [ca for ca in caller.get_ca_certs() if ca.get("subject") == certificate["issuer"]]
    ends = [ssl.cert_time_to_seconds(str(each["notAfter"])) for each in (certificate, *issuers)]
    return TlsContexts(caller, tcp_caller, listener, min(ends))


def warn_of_public_files(security: LinkSecurity | None) -> None:
    """Says so in the log when others than their owner can read what must be secret."""
    for file in () if security is None else (security.secret_file, security.key):
        with refusals_ignored():  # it was read a moment ago, and is read again
            if file and is_public(file):
                get_logger().warning(
                    "link_security: every user of this host can read %s; chmod o-r %s", file, file
                )


def _context(security: LinkSecurity, protocol: ssl._SSLMethod, able: list[str]) -> ssl.SSLContext:
    """With what this end can do behind the hand-shake, the best first."""
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the authority says who is a cluster; clusters move
    context.verify_mode = ssl.CERT_REQUIRED
    if able:
        context.set_alpn_protocols(able)
    certificate, key = security.certificate, security.key
    try:
        context.load_verify_locations(security.ca)
    except OSError as error:
        pass_on_handlers(error)
        raise invalid(f"{_NAME}: the CA in {security.ca}: {_reason(error)}") from None
    try:
        context.load_cert_chain(certificate, key, password=_refuse)
    except _EncryptedKey:
        raise invalid(
            f"{_NAME}: the key {key} is encrypted, and nobody is asked for its pass phrase; "
            f"decrypt it (openssl pkey -in {key} -out ...)"
        ) from None
    except OSError as error:
        pass_on_handlers(error)
        if getattr(error, "reason", None) in _OTHER_KEY:
            raise invalid(
                f"{_NAME}: the key {key} is not that of the certificate {certificate}"
            ) from None
        raise invalid(f"{_NAME}: {certificate} or its key {key}: {_reason(error)}") from None
    return context


def _refuse() -> NoReturn:
    raise _EncryptedKey


def _reason(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or str(error)


def _rehearse(caller: ssl.SSLContext, listener: ssl.SSLContext) -> dict[str, Any]:
    """Has both ends shake hands. Our certificate as the other end sees it.

    Raises ssl.SSLError; NamesNoCluster.
    """
    to_caller, to_listener = ssl.MemoryBIO(), ssl.MemoryBIO()
    calling = caller.wrap_bio(to_caller, to_listener)
    listening = listener.wrap_bio(to_listener, to_caller, server_side=True)
    for end in (calling, listening, calling):
        with suppress(ssl.SSLWantReadError):
            end.do_handshake()
    listening.do_handshake()
    Certificate.of_peer(listening)
    return dict(listening.getpeercert() or {})


def _blame(
    error: ssl.SSLCertVerificationError,
    security: LinkSecurity,
    caller: ssl.SSLContext,
    listener: ssl.SSLContext,
) -> str:
    """Of which file it is that the other end would not accept it."""
    fault, file = fault_of(error), security.certificate
    if error.verify_code not in _TIMES:
        return f"the certificate {file} {fault} ({security.ca})"
    for context in (caller, listener):
        context.verify_flags |= _NO_CHECK_TIME
    try:
        certificate = _rehearse(caller, listener)
    except (ssl.SSLError, NamesNoCluster):  # that is not all that is wrong
        return f"the certificate {file} {fault} ({security.ca})"
    begin, end = str(certificate["notBefore"]), str(certificate["notAfter"])
    begins, ends = ssl.cert_time_to_seconds(begin), ssl.cert_time_to_seconds(end)
    if begins <= time.time() <= ends:
        return f"an authority in {security.ca}, or between it and {file}, {fault}"
    remedy = "is this host's clock right?" if begins > time.time() else "have its CA issue another"
    return f"the certificate {file} {fault} (it is valid from {begin} to {end}); {remedy}"
