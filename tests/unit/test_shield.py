"""The shields by TLS, two ends in one thread: whom they accept, and what both ends say."""

from __future__ import annotations

import hashlib
import socket
import ssl
import subprocess
import threading
import tracemalloc
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest

from certificates import Authority, Files, contexts_of
from llm_datadist.core import messages as m
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.link_security import LinkSecurity
from llm_datadist.running.deadline import Deadline
from llm_datadist.transport.certificate import Certificate
from llm_datadist.transport.records import PART_NBYTES, PROTOCOL, RECORD_NBYTES
from llm_datadist.transport.sealed import SealedStream
from llm_datadist.transport.shield import NotAuthentic
from llm_datadist.transport.shields import Shields
from llm_datadist.transport.stream import RequestRefused
from llm_datadist.transport.tls import Tls
from meeting import meet

if TYPE_CHECKING:
    from pathlib import Path

SECRET = LinkSecurity(secret=b"a secret of more than sixteen bytes")


@pytest.mark.parametrize("stranger", ["caller", "listener"])
@pytest.mark.parametrize(
    ("begins_in_s", "ends_in_s", "says", "hears"),
    [
        (-7200, -3600, "has expired", "says that this end's certificate has expired"),
        (3600, 7200, "is not yet valid", "by the peer's clock it is not yet valid"),
        (-3600, 3600, "is of another authority", "says that this end's certificate is of another"),
    ],
    ids=["expired", "not-yet-valid", "another-authority"],
)
def test_both_ends_say_what_is_wrong_with_a_certificate(
    tmp_path: Path, stranger: str, begins_in_s: float, ends_in_s: float, says: str, hears: str
) -> None:
    authority = Authority()
    good = authority.issue(tmp_path / "good")
    issuer = Authority() if "another" in says else authority
    bad = issuer.issue(tmp_path / "bad", begins_in_s, ends_in_s)
    known, unknown = contexts_of(good, good.ca), contexts_of(bad, good.ca)
    callers, listeners = (unknown, known) if stranger == "caller" else (known, unknown)
    at_caller, at_listener = meet(
        Tls(callers[0], is_caller=True), Tls(listeners[1], is_caller=False)
    )
    there, here = (at_caller, at_listener) if stranger == "caller" else (at_listener, at_caller)
    assert f"the peer's certificate {says}" in here
    assert hears in there


def test_a_caller_without_a_certificate_is_told_so(tmp_path: Path) -> None:
    files = Authority().issue(tmp_path)
    caller = Tls(contexts_of(None, files.ca)[0], is_caller=True)
    listener = Tls(contexts_of(files, files.ca)[1], is_caller=False)
    assert meet(caller, listener) == (
        "the peer wants a certificate, and this end showed none", "the peer showed no certificate"
    )  # fmt: skip


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def issue(folder: Path, extension: str) -> LinkSecurity:
    """Files with a certificate that has an extension of OpenSSL's configuration."""
    make = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout"]
    openssl(folder, *make, "ca.key", "-x509", "-subj", "/CN=ca", "-days", "2", "-out", "ca.pem")
    openssl(folder, *make, "me.key", "-subj", "/CN=me", "-out", "me.csr")
    (folder / "me.ext").write_text(extension)
    openssl(
        folder, "x509", "-req", "-in", "me.csr", "-extfile", "me.ext", "-CA", "ca.pem",
        "-CAkey", "ca.key", "-CAcreateserial", "-days", "1", "-out", "me.pem",
    )  # fmt: skip
    return LinkSecurity(None, "", *(str(folder / name) for name in ("ca.pem", "me.pem", "me.key")))


@pytest.mark.parametrize(
    ("names", "cluster_ids"),
    [
        ((), set()),
        (("URI:llm-datadist:cluster:7",), {7}),
        (
            (
                "URI:llm-datadist:cluster:0",
                "DNS:host",
                "URI:https://example.org",
                "URI:llm-datadist:cluster:18446744073709551615",
            ),
            {0, 2**64 - 1},
        ),
    ],
    ids=["none", "one", "several"],
)
def test_a_shield_knows_the_peers_certificate(
    tmp_path: Path, names: tuple[str, ...], cluster_ids: set[int]
) -> None:
    security = issue(tmp_path, f"subjectAltName={','.join(names)}" if names else "")
    shields = Shields(security)
    ends = shields.make(is_caller=True), shields.make(is_caller=False)
    assert [end.peer_certificate for end in ends] == [None, None], "not before the hand-shake"
    assert meet(*ends) == ("", "")
    der = ssl.PEM_cert_to_DER_cert((tmp_path / "me.pem").read_text())
    expected = Certificate(hashlib.sha256(der).digest(), frozenset(cluster_ids))
    assert [end.peer_certificate for end in ends] == [expected, expected]


@pytest.mark.parametrize("cluster", ["", "one", "-1", "7x", "1" * 21])
def test_a_certificate_for_a_cluster_that_cannot_be_is_for_none(
    tmp_path: Path, cluster: str
) -> None:
    """Read as one that names no cluster it would be for all of them."""
    security = issue(tmp_path, f"subjectAltName=URI:llm-datadist:cluster:{cluster}")
    files = Files(*(tmp_path / name for name in ("ca.pem", "me.pem", "me.key")))
    with pytest.raises(LLMException, match="which is no cluster id"):
        Shields(security)
    caller, listener = contexts_of(files, files.ca)
    at_caller, _ = meet(Tls(caller, is_caller=True), Tls(listener, is_caller=False))
    assert "the peer's certificate names the cluster" in at_caller


@pytest.mark.parametrize("purpose", ["clientAuth", "serverAuth"])
def test_a_certificate_for_one_end_only_is_refused(tmp_path: Path, purpose: str) -> None:
    security = issue(tmp_path, f"extendedKeyUsage={purpose}")
    with pytest.raises(LLMException, match="it needs the purposes clientAuth and serverAuth"):
        Shields(security)


@pytest.mark.parametrize("security", [None, SECRET], ids=["none", "secret"])
def test_without_tls_there_is_no_certificate(security: LinkSecurity | None) -> None:
    shields = Shields(security)
    ends = shields.make(is_caller=True), shields.make(is_caller=False)
    assert meet(*ends) == ("", "")
    assert [end.peer_certificate for end in ends] == [None, None]


def test_what_is_said_between_the_keys_and_the_records_is_refused(tmp_path: Path) -> None:
    """In one record of TLS with the keys; nothing that was said is dropped in silence."""
    files = Authority().issue(tmp_path)
    contexts = contexts_of(files, files.ca)
    for context in contexts:
        context.set_alpn_protocols([PROTOCOL])
    came, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
    caller, listener = contexts[0].wrap_bio(came, sent), Tls(contexts[1], is_caller=False)
    with suppress(ssl.SSLWantReadError):
        caller.do_handshake()
    came.write(listener.answer(sent.read()))
    caller.do_handshake()
    caller.write(bytes(PART_NBYTES) + b"early")
    with pytest.raises(NotAuthentic, match="before the hand-shake had ended"):
        listener.answer(sent.read())


def test_a_stream_that_waits_keeps_no_room_for_records(tmp_path: Path) -> None:
    """A cluster may have thousands of them."""
    files = [str(file) for file in Authority().issue(tmp_path)]
    shields = Shields(LinkSecurity(None, "", *files))
    caller, listener = shields.make(is_caller=True), shields.make(is_caller=False)
    assert isinstance(caller, Tls)
    assert meet(caller, listener) == ("", "")
    data, arrived = b"of a cache " * RECORD_NBYTES, np.zeros(11 * RECORD_NBYTES, np.uint8)
    vectors = np.array([(arrived.ctypes.data, len(data))], np.uint64)
    here, there = socket.socketpair()
    with here, there:
        stream = SealedStream(here, caller)
        sending = threading.Thread(target=there.sendall, args=(listener.seal(data),))
        sending.start()
        tracemalloc.start()
        try:
            stream.receive_into(vectors, len(data), Deadline.after(20.0))
            kept_nbytes, most_nbytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            sending.join()
    assert arrived.tobytes() == data
    assert kept_nbytes < RECORD_NBYTES // 8 < most_nbytes


@pytest.mark.parametrize("text", ["", "gone", "a text that is longer than a number"])
def test_a_refusal_under_tls_is_not_waited_behind(tmp_path: Path, text: str) -> None:
    """It is shorter than the likely answer, and nothing comes behind it."""
    files = [str(file) for file in Authority().issue(tmp_path)]
    shields = Shields(LinkSecurity(None, "", *files))
    caller, listener = shields.make(is_caller=True), shields.make(is_caller=False)
    assert isinstance(caller, Tls)
    assert meet(caller, listener) == ("", "")
    refused = m.Refused(LLMStatusCode.LLM_KV_CACHE_NOT_EXIST, text)
    here, there = socket.socketpair()
    with here, there:
        there.sendall(listener.seal(m.encode(refused)))
        with pytest.raises(RequestRefused):
            SealedStream(here, caller).answer(Deadline.after(2.0), likely=m.Sending(2**40))
