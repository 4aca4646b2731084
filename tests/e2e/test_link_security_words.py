"""What both ends say when their link security does not go together."""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING

import pytest

from certificates import Authority
from llm_datadist import LLMException, LLMRole, LLMStatusCode
from llm_datadist.endpoint import Endpoint
from llm_datadist.options import read_link_security
from llm_datadist.peer.asking import ask_stats
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from llm_datadist.testing.cluster import Node, NodeProcess

SECRET = json.dumps({"secret": "a secret of more than sixteen bytes"})
OPEN = "no link security"
KINDS = (OPEN, "a shared secret", "TLS")


class Said(logging.Handler):
    """Keeps what a listener logs, in its process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    @classmethod
    def of(cls, node: Node) -> Said:
        said: Said = node.said  # type: ignore[attr-defined]
        return said


LOGGER = logging.getLogger("LLM_DATADIST")


def start_listener(node: Node, security: str) -> int:
    LOGGER.setLevel(logging.WARNING)
    LOGGER.addHandler(said := Said())
    node.said = said  # type: ignore[attr-defined]  # for the calls that come
    return node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", link_security=security)


def refused_by(node: Node) -> list[str]:
    """What the listener said of connections that it refused."""
    begin = "refused a connection from 127.0.0.1: link security: "
    return [line for line in Said.of(node).lines if line.startswith(begin)]


def be_silent(node: Node) -> None:
    LOGGER.removeHandler(Said.of(node))
    LOGGER.setLevel(logging.ERROR)


@pytest.fixture
def listening(peer: NodeProcess) -> Iterator[NodeProcess]:
    """A process for a listener, of which it is known what it logs."""
    yield peer
    peer.call(be_silent)


@pytest.fixture
def reason(node: Node, caplog: pytest.LogCaptureFixture) -> Callable[[int], str]:
    """Links to a port, which fails; why."""

    def link(port: int) -> str:
        with takes_at_most(3), caplog.at_level(logging.ERROR, "LLM_DATADIST"):
            status = node.link(port, 1)
        assert status in (LLMStatusCode.LLM_LINK_FAILED, LLMStatusCode.LLM_FAILED)
        return str(caplog.records[-1].__dict__["reason"])

    return link


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> str:
    return Authority().issue(tmp_path_factory.mktemp("files")).option()


def option(kind: str, tls: str) -> str:
    return {OPEN: "", "TLS": tls}.get(kind, SECRET)


PAIRS = [(caller, listener) for caller in KINDS for listener in KINDS if caller != listener]


@pytest.mark.parametrize(("caller", "listener"), PAIRS)
def test_ends_of_different_kinds_both_say_so(
    node: Node, listening: NodeProcess, tls: str, caller: str, listener: str,
    reason: Callable[[int], str],
) -> None:  # fmt: skip
    port = listening.call(start_listener, option(listener, tls))
    node.start(LLMRole.DECODER, 2, link_security=option(caller, tls))
    assert f"the peer has {listener}, and this end has {caller}" in reason(port)
    assert eventually(lambda: len(listening.call(refused_by)) == 1)
    assert f"the peer has {caller}, and this end has {listener}" in listening.call(refused_by)[0]


@pytest.mark.parametrize(("caller", "listener"), PAIRS)
def test_who_asks_with_another_kind_is_told_so(
    node: Node, tls: str, caller: str, listener: str
) -> None:
    port = node.start(
        LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", link_security=option(listener, tls)
    )
    given = {} if caller == OPEN else {"llm_datadist.LinkSecurity": option(caller, tls)}
    with takes_at_most(5), pytest.raises(LLMException) as error:
        ask_stats(Endpoint("127.0.0.1", port), read_link_security(given), 5)
    assert f"the peer has {listener}, and this end has {caller}" in str(error.value)


@pytest.mark.parametrize("stranger", ["caller", "listener"])
def test_a_certificate_of_another_authority_is_named_at_both_ends(
    node: Node, listening: NodeProcess, tmp_path: Path, stranger: str, reason: Callable[[int], str]
) -> None:
    ours, theirs = Authority(), Authority()
    known = ours.issue(tmp_path / "known").option()
    unknown = theirs.issue(tmp_path / "unknown", trusting=(ours,)).option()
    of_listener, of_caller = (known, unknown) if stranger == "caller" else (unknown, known)
    port = listening.call(start_listener, of_listener)
    node.start(LLMRole.DECODER, 2, link_security=of_caller)
    at_caller = reason(port)
    assert eventually(lambda: len(listening.call(refused_by)) == 1)
    [at_listener] = listening.call(refused_by)
    there, here = (at_caller, at_listener) if stranger == "caller" else (at_listener, at_caller)
    assert "the peer's certificate is of another authority than those of `ca`" in here
    assert "the peer says that this end's certificate is of another authority" in there


@pytest.mark.parametrize("late", ["caller", "listener"])
def test_a_certificate_that_expires_is_named_at_both_ends(
    node: Node, listening: NodeProcess, tmp_path: Path, late: str, reason: Callable[[int], str]
) -> None:
    authority = Authority()
    good = authority.issue(tmp_path / "good").option()
    short = authority.issue(tmp_path / "short", ends_in_s=2).option()
    end = time.time() + 2
    of_listener, of_caller = (good, short) if late == "caller" else (short, good)
    port = listening.call(start_listener, of_listener)
    node.start(LLMRole.DECODER, 2, link_security=of_caller)
    assert node.link(port, 1) == LLMStatusCode.LLM_SUCCESS
    assert eventually(lambda: time.time() > end)
    assert len(node.datadist.links()) == 1, "a link that is made goes on"
    assert node.unlink(port, 1) != LLMStatusCode.LLM_PARAM_INVALID
    at_caller = reason(port)
    assert eventually(lambda: len(listening.call(refused_by)) == 1)
    [at_listener] = listening.call(refused_by)
    there, here = (at_caller, at_listener) if late == "caller" else (at_listener, at_caller)
    assert "the peer's certificate has expired" in here
    assert "the peer says that this end's certificate has expired" in there


def test_each_reason_to_refuse_an_address_is_logged_once(
    node: Node, listening: NodeProcess, tls: str
) -> None:
    port = listening.call(start_listener, SECRET)
    for security in ("", tls, ""):
        node.start(LLMRole.DECODER, 2, link_security=security)
        assert node.link(port, 1) != LLMStatusCode.LLM_SUCCESS
        node.stop()
    assert eventually(lambda: len(listening.call(refused_by)) == 2)
