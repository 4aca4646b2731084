"""Files of link security that cannot be used are refused at once; renewed ones are taken."""

from __future__ import annotations

import json
import logging
import os
import socket
import ssl
import subprocess
from typing import TYPE_CHECKING

import numpy as np
import pytest

from certificates import Authority, Files, replace
from llm_datadist import BlocksCacheKey, LLMDataDist, LLMException, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess, make_array
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SUCCESS = LLMStatusCode.LLM_SUCCESS
SHAPE = (1, 4, 1024)
KEY = BlocksCacheKey(1, 0)


def refusal(option: str) -> str:
    """Why a cluster does not begin with it."""
    datadist = LLMDataDist(LLMRole.PROMPT, 1)
    try:
        with takes_at_most(5), pytest.raises(LLMException) as error:
            datadist.init({"llm.EnableCacheManager": "1", "llm_datadist.LinkSecurity": option})
    finally:
        datadist.finalize()  # else one that begins would have all other tests fail
    assert error.value.status_code == LLMStatusCode.LLM_PARAM_INVALID
    assert "\n" not in str(error.value)
    return str(error.value)


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def make_pipe(folder: Path) -> Path:
    os.mkfifo(pipe := folder / "pipe")
    return pipe


def write(content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (file := folder / "made").write_bytes(content)
        return file

    return make


#: by words of the refusal: what stands in place of a file
NO_FILES: dict[str, Callable[[Path], Path]] = {
    "is a pipe": make_pipe,
    "/dev/zero is a device": lambda _: type(_)("/dev/zero"),
    "is a directory": lambda folder: folder,
    "is empty": write(b"\n"),
    "has more than 1048576 bytes": write(bytes(1024 * 1024 + 1)),
    "there is no file": lambda folder: folder / "none",
}


@pytest.mark.parametrize("field", ["secret_file", *Files._fields])
@pytest.mark.parametrize("words", NO_FILES)
def test_what_is_no_file_is_refused_and_not_waited_for(
    tmp_path: Path, field: str, words: str
) -> None:
    file = NO_FILES[words](tmp_path)
    if field == "secret_file":
        option = json.dumps({"secret_file": str(file)})
    else:
        option = Authority().issue(tmp_path / "files").option(**{field: file})
    said = refusal(option)
    assert words in said
    assert str(file) in said


@pytest.mark.parametrize(
    ("field", "what"), [("ca", "certificate"), ("certificate", "certificate"), ("key", "private")]
)
def test_what_is_not_in_pem_format_is_refused(tmp_path: Path, field: str, what: str) -> None:
    (file := tmp_path / "other").write_text("something else")
    said = refusal(Authority().issue(tmp_path).option(**{field: file}))
    assert f"{file} holds no {what}" in said


@pytest.mark.parametrize(
    ("begins_in_s", "ends_in_s", "words"),
    [(-7200, -3600, "has expired"), (3600, 7200, "is not yet valid")],
)
def test_a_certificate_that_is_not_valid_now_is_refused(
    tmp_path: Path, begins_in_s: float, ends_in_s: float, words: str
) -> None:
    files = Authority().issue(tmp_path, begins_in_s, ends_in_s)
    assert f"the certificate {files.certificate} {words} (it is valid from" in refusal(
        files.option()
    )


def test_a_certificate_of_another_authority_is_refused(tmp_path: Path) -> None:
    ours, theirs = (Authority().issue(tmp_path / name) for name in ("ours", "theirs"))
    said = refusal(ours.option(ca=theirs.ca))
    assert f"the certificate {ours.certificate} is of another authority" in said
    assert str(theirs.ca) in said


@pytest.mark.parametrize("algorithm", ["EC", "RSA"])
def test_a_key_of_another_certificate_is_refused(tmp_path: Path, algorithm: str) -> None:
    files, other = Authority().issue(tmp_path), tmp_path / "other.pem"
    bits = {"EC": "ec_paramgen_curve:P-256", "RSA": "rsa_keygen_bits:2048"}[algorithm]
    openssl("genpkey", "-algorithm", algorithm, "-pkeyopt", bits, "-out", str(other))
    said = refusal(files.option(key=other))
    assert f"the key {other} is not that of the certificate {files.certificate}" in said


def test_nobody_is_asked_for_the_pass_phrase_of_a_key(tmp_path: Path) -> None:
    files, encrypted = Authority().issue(tmp_path), tmp_path / "encrypted.pem"
    encrypting = "pkey", "-aes256", "-passout", "pass:hush-hush"
    openssl(*encrypting, "-in", str(files.key), "-out", str(encrypted))
    said = refusal(files.option(key=encrypted))
    assert f"the key {encrypted} is encrypted" in said
    assert "openssl pkey" in said


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged at WARNING or above, so far."""
    caplog.set_level(logging.WARNING, "LLM_DATADIST")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
@pytest.mark.parametrize("kind", ["secret", "tls"])
def test_what_everybody_can_read_is_warned_of(
    node: Node, tmp_path: Path, mode: int, kind: str, warnings: Callable[[], list[str]]
) -> None:
    files = Authority().issue(tmp_path)
    (secret := tmp_path / "secret").write_text("a secret of many bytes")
    file, option = secret, json.dumps({"secret_file": str(secret)})
    if kind == "tls":
        file, option = files.key, files.option()
    file.chmod(mode)
    node.start(LLMRole.PROMPT, 1, link_security=option)
    said = [line for line in warnings() if f"every user of this host can read {file}" in line]
    assert len(said) == (mode == 0o644)


# -- renewal --


def own_blocks(node: Node, seed: int) -> None:
    node.blocks_cache(*SHAPE, seed=seed, key=KEY)


class Pair:
    """A listener in another process, and the caller here; each has files of its own."""

    def __init__(self, node: Node, peer: NodeProcess, theirs: str, ours: str) -> None:
        self.node = node
        self.port: int = peer.call(
            Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", transfer_path="tcp",
            link_security=theirs,
        )  # fmt: skip
        peer.call(own_blocks, 1)
        node.start(LLMRole.DECODER, 2, transfer_path="tcp", link_security=ours)
        self.cache = node.blocks_cache(*SHAPE)

    def link(self) -> LLMStatusCode:
        return self.node.link(self.port, 1)

    def relink(self) -> LLMStatusCode:
        assert self.node.unlink(self.port, 1) == SUCCESS
        return self.link()

    def pull(self) -> None:
        self.node.arrays[self.cache.cache_id][:] = 0
        self.node.manager.pull_blocks(KEY, self.cache, [0, 1, 2, 3], [0, 1, 2, 3])
        np.testing.assert_array_equal(self.node.arrays[self.cache.cache_id], make_array(SHAPE, 1))


def test_a_link_outlasts_the_renewal_of_all_files_and_new_ones_are_made_by_them(
    node: Node, peer: NodeProcess, tmp_path: Path
) -> None:
    before, after = Authority(), Authority()
    theirs, ours = (before.issue(tmp_path / name) for name in ("theirs", "ours"))
    pair = Pair(node, peer, theirs.option(), ours.option())
    assert pair.link() == SUCCESS
    pair.pull()
    after.issue(tmp_path / "theirs")
    pair.pull()
    assert pair.relink() != SUCCESS, "the files of this end are the former ones"
    after.issue(tmp_path / "ours")
    assert pair.link() == SUCCESS
    pair.pull()


def test_a_secret_is_renewed(node: Node, peer: NodeProcess, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for file in (theirs, ours):
        replace(file, b"the secret of yesterday")
    options = [json.dumps({"secret_file": str(file)}) for file in (theirs, ours)]
    pair = Pair(node, peer, *options)
    assert pair.link() == SUCCESS
    replace(theirs, b"the secret of today....")
    pair.pull()
    assert pair.relink() != SUCCESS
    replace(ours, b"the secret of today....")
    assert pair.link() == SUCCESS
    pair.pull()


def shown_at(port: int, files: Files) -> bytes:
    """The certificate that a listener shows to a stranger."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(files.ca)
    with (
        socket.create_connection(("127.0.0.1", port), 5) as sock,
        context.wrap_socket(sock) as tls,
    ):
        return tls.getpeercert(binary_form=True) or b""


@pytest.mark.parametrize("broken", ["half", "other-key", "gone", "expired", "pipe"])
def test_a_renewal_that_cannot_be_used_keeps_what_was_there_with_one_warning(
    node: Node, tmp_path: Path, broken: str, warnings: Callable[[], list[str]]
) -> None:
    authority = Authority()
    files, new = (authority.issue(tmp_path / name) for name in ("ours", "new"))
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", link_security=files.option())
    first = shown_at(port, files)
    content = new.certificate.read_bytes()
    if broken == "half":
        files.certificate.write_bytes(content[:-100])
    elif broken == "other-key":
        replace(files.certificate, content)
    elif broken == "gone":
        files.certificate.unlink()
    elif broken == "expired":
        authority.issue(tmp_path / "ours", -7200, -3600)
    else:
        files.certificate.unlink()
        os.mkfifo(files.certificate)
    for _ in range(3):
        assert shown_at(port, files) == first
    said = [line for line in warnings() if "what was there before goes on" in line]
    assert len(said) == 1, warnings()
    assert str(files.certificate) in said[0]
    replace(files.key, new.key.read_bytes())
    replace(files.certificate, content)
    assert shown_at(port, files) == ssl.PEM_cert_to_DER_cert(content.decode())


def test_a_renewal_that_is_not_valid_yet_is_tried_again_without_being_touched(
    node: Node, tmp_path: Path
) -> None:
    authority = Authority()
    files = authority.issue(tmp_path / "ours")
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", link_security=files.option())
    first = shown_at(port, files)
    authority.issue(tmp_path / "ours", begins_in_s=2)
    assert eventually(lambda: shown_at(port, files) != first)
