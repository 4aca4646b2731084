"""Certificates of peers: what they say, and in words what is wrong with them."""

from __future__ import annotations

import hashlib
import ssl
from dataclasses import dataclass
from typing import Any, Final, final

#: of a URI among the alternative names: a cluster that the certificate is for
CLUSTER_URI: Final = "llm-datadist:cluster:"
#: what to do where two ends do not accept each other's certificates
REMEDY: Final = "each end needs a valid certificate of an authority in the other end's CA file"
_OF_ANOTHER: Final = "is of another authority than those of `ca`"
#: by OpenSSL's X509_V_ERR_...
_FAULTS: Final = {
    2: _OF_ANOTHER,
    7: _OF_ANOTHER,  # an authority of the same name
    9: "is not yet valid",
    10: "has expired",
    18: _OF_ANOTHER,
    19: _OF_ANOTHER,
    20: _OF_ANOTHER,
    21: _OF_ANOTHER,
    26: "is not for both ends of TLS: it needs the purposes clientAuth and serverAuth, or none",
}
#: by how the name of OpenSSL's reason ends: how it begins differs between releases
_ALERTS: Final = {
    "ALERT_CERTIFICATE_EXPIRED": "the peer says that this end's certificate has expired",
    "ALERT_UNKNOWN_CA": "the peer says that this end's certificate is of another authority",
    "ALERT_DECRYPT_ERROR": "the peer says that this end's certificate is of another authority",
    "ALERT_BAD_CERTIFICATE": "the peer does not accept this end's certificate: by the peer's clock "
    "it is not yet valid, or else it is broken",
    "ALERT_UNSUPPORTED_CERTIFICATE": "the peer says that this end's certificate is for other "
    "purposes",
    "ALERT_CERTIFICATE_REQUIRED": "the peer wants a certificate, and this end showed none",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the peer showed no certificate",
}  # fmt: skip


class NamesNoCluster(Exception):
    """A certificate is for a cluster that cannot be; to be read behind "the certificate ...".

    No ValueError, which a signal's handler may raise while a hand-shake is under way.
    """


@final
@dataclass(frozen=True, slots=True)
class Certificate:
    """What is known of a peer by its certificate, which an authority of ours has signed."""

    #: SHA-256 of all of it
    fingerprint: bytes
    #: the clusters that it is for; empty when it names none
    cluster_ids: frozenset[int]

    @classmethod
    def of_peer(cls, tls: ssl.SSLObject) -> Certificate:
        """The peer's, behind the hand-shake.

        Raises NamesNoCluster for one that is no number: read as none, it would be for all.
        """
        fields: dict[str, Any] = tls.getpeercert() or {}
        names = [name for kind, name in fields.get("subjectAltName", ()) if kind == "URI"]
        ids = [name[len(CLUSTER_URI) :] for name in names if name.startswith(CLUSTER_URI)]
        for each in ids:
            if not (each.isascii() and each.isdigit() and len(each) <= 20):
                raise NamesNoCluster(f"names the cluster {each!r:.40}, which is no cluster id")
        der = tls.getpeercert(binary_form=True) or b""
        return cls(hashlib.sha256(der).digest(), frozenset(map(int, ids)))


def fault_of(error: ssl.SSLCertVerificationError) -> str:
    """What is wrong with a certificate, as the end of a sentence that begins with its name."""
    return _FAULTS.get(error.verify_code) or f"is not valid: {error.verify_message}"


def explain(error: ssl.SSLError) -> str:
    """Why a hand-shake failed, or bytes behind it are not what they must be."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the peer's certificate {fault_of(error)}"
    reason = error.reason or str(error)
    for name, words in _ALERTS.items():
        if reason.endswith(name):
            return words
    return f"TLS: {reason}"
