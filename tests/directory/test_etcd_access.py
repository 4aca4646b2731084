"""etcd as a directory for those whom it lets in: users with passwords, and TLS."""

from __future__ import annotations

import ssl
from base64 import b64encode
from typing import TYPE_CHECKING

import pytest

from certificates import Authority
from directory.etcd_server import EtcdServer, etcd_program
from directory.records import record, until
from llm_datadist import LLMException
from llm_datadist.directory import DirectoryError, EtcdDirectory, open_directory
from llm_datadist.directory.gateway import Gateway

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from llm_datadist.directory import Directory

TTL_S = 2.0
PASSWORD = "fleet's own, 1 word"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """A server that lets only users in: root, and `fleet` to one prefix."""
    with EtcdServer(tmp_path_factory.mktemp("etcd"), etcd_program()) as server:
        first, last = (b64encode(key).decode() for key in (b"/fleet/", b"/fleet0"))
        readwrite = {"permType": "READWRITE", "key": first, "range_end": last}
        for name in ("root", "fleet"):
            server.ask("/v3/auth/user/add", {"name": name, "password": PASSWORD})
            server.ask("/v3/auth/role/add", {"name": name})
            server.ask("/v3/auth/user/grant", {"user": name, "role": name})
        server.ask("/v3/auth/role/grant", {"name": "fleet", "perm": readwrite})
        server.ask("/v3/auth/enable", {})
        yield server


def goes_round(directory: Directory) -> bool:
    """Whether a member is heard of, and its end."""
    watch, announcement = directory.watch(), directory.announce(record(1), TTL_S)
    try:
        heard = until(watch, bool).joined == (record(1),)
        announcement.renew()
        announcement.withdraw()
        return heard and until(watch, bool).left == (record(1),)
    finally:
        watch.close()
        announcement.close()


def test_a_user_is_let_in_by_its_password(guarded: EtcdServer, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\n")
    word = guarded.url.replace("http:", "etcd:") + f"/fleet?user=fleet&password_file={file}"
    assert goes_round(open_directory(word))


def test_whoever_has_another_password_or_none_is_not_let_in(guarded: EtcdServer) -> None:
    wrong = EtcdDirectory(guarded.url, "/fleet", user="fleet", password="another")
    with pytest.raises(DirectoryError, match="does not let fleet in") as caught:
        wrong.announce(record(1), TTL_S)
    assert "another" not in str(caught.value)
    with pytest.raises(DirectoryError, match="does not let fleet in"):
        wrong.watch().wait(1)
    with pytest.raises(DirectoryError, match="refuses /v3/"):
        EtcdDirectory(guarded.url, "/fleet").announce(record(1), TTL_S)
    others = EtcdDirectory(guarded.url, "/others", user="fleet", password=PASSWORD)
    with pytest.raises(DirectoryError, match="permission denied"):
        others.announce(record(1), TTL_S)


def test_a_token_that_etcd_has_forgotten_is_asked_for_anew(guarded: EtcdServer) -> None:
    """As it does with those of a user whose password is set."""
    directory = EtcdDirectory(guarded.url, "/fleet", user="fleet", password=PASSWORD)
    watch, announcement = directory.watch(), directory.announce(record(1), 60)
    until(watch, bool)
    root = Gateway(guarded.url, None, "root", PASSWORD)
    root.ask("/v3/auth/user/changepw", {"name": "fleet", "password": PASSWORD})
    announcement.renew()
    guarded.kill()
    guarded.start()
    announcement.change(record(1, role="MIX"))
    assert until(watch, bool).changed[0].now.role == "MIX"
    announcement.withdraw()
    watch.close()


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def sealed(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """A server with a certificate, which asks clients for theirs."""
    folder = tmp_path_factory.mktemp("etcd")
    files = authority.issue(folder / "tls", name="127.0.0.1")
    with EtcdServer(folder, etcd_program(), files) as server:
        yield server


def test_tls_with_certificates_of_both_ends(
    sealed: EtcdServer, authority: Authority, tmp_path: Path
) -> None:
    files = authority.issue(tmp_path / "mine")
    said = "&".join(f"{name}={path}" for name, path in files._asdict().items())
    assert goes_round(open_directory(sealed.url.replace("https:", "etcds:") + f"/fleet?{said}"))


def test_strangers_at_either_end_of_tls_are_refused(
    sealed: EtcdServer, authority: Authority, tmp_path: Path
) -> None:
    mine = authority.issue(tmp_path / "mine")
    strangers = Authority().issue(tmp_path / "strangers")
    for ca, certificate in ((strangers.ca, mine), (mine.ca, strangers), (mine.ca, None)):
        context = ssl.create_default_context(cafile=ca)
        if certificate is not None:
            context.load_cert_chain(certificate.certificate, certificate.key)
        directory = EtcdDirectory(sealed.url, "/fleet", tls=context)
        with pytest.raises(DirectoryError, match="does not answer"):
            directory.announce(record(1), TTL_S)
        watch = directory.watch()
        with pytest.raises(DirectoryError):
            watch.wait(1)
        watch.close()
    with pytest.raises(DirectoryError, match="does not answer"):
        EtcdDirectory(sealed.url.replace("https", "http"), "/fleet").announce(record(1), TTL_S)


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ("?users=me", "has users: etcd takes ca, certificate, key, user, password_file"),
        ("?user=me", "needs both user and password_file, or neither"),
        ("?user=me&password_file=/nowhere/x", "password_file: there is no file"),
        ("?ca=/nowhere/ca.pem", "ca: there is no file"),
        ("?ca={junk}", "TLS for etcd cannot be had of these files"),
        ("?certificate={junk}", "TLS for etcd cannot be had of these files"),
    ],
)
def test_words_that_cannot_be_meant(tmp_path: Path, rest: str, said: str) -> None:
    (tmp_path / "junk").write_text("no certificate\n")
    word = "etcds://127.0.0.1:1/fleet" + rest.replace("{junk}", str(tmp_path / "junk"))
    with pytest.raises(LLMException, match=said):
        open_directory(word)


def test_files_of_tls_need_tls() -> None:
    with pytest.raises(LLMException, match="names files of TLS, which etcds://"):
        open_directory("etcd://127.0.0.1:1/fleet?ca=/some/ca.pem")
