"""Ids are defended: a newcomer with the id of a live link does not silently take it over."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import socket
import ssl
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from itertools import cycle
from typing import TYPE_CHECKING, Any

import pytest
from keyed_wire import BY_SECRET, KeyedWire
from wire import NONCE, PATIENCE_S, Wire, hello, impostor, linked_caller, owner

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.core import messages as m
from llm_datadist.core.connection_names import Ends, named, renamed
from llm_datadist.testing.cluster import Node, NodeProcess, cluster_info
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SUCCESS = LLMStatusCode.LLM_SUCCESS
LINK_FAILED = LLMStatusCode.LLM_LINK_FAILED
SHAPE = (1, 4, 64)
MINE, OTHERS = 0x11, 0x22
OTHER_NONCE = bytes(range(16, 32))


@pytest.fixture(autouse=True)
def _see_warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "LLM_DATADIST")


@pytest.fixture
def other() -> Iterator[NodeProcess]:
    with NodeProcess() as process:
        yield process


def publish(node: Node, fill: int) -> None:
    cache = node.blocks_cache(*SHAPE, key=BlocksCacheKey(0, 0))
    node.arrays[cache.cache_id][:] = fill


def serve(node: Node, cluster_id: int, fill: int, **settings: Any) -> int:
    port = node.start(LLMRole.MIX, cluster_id, listen_ip_info="127.0.0.1:0", **settings)
    publish(node, fill)
    return port


def pulled(node: Node, cluster_id: int) -> int:
    """What the first byte of that cluster's cache is."""
    cache = node.blocks_cache(*SHAPE)
    node.manager.pull_blocks(BlocksCacheKey(cluster_id, 0), cache, [0], [0])
    return int(node.arrays[cache.cache_id][0, 0, 0])


def ids_of(node: Node) -> list[int]:
    return [link.cluster_id for link in node.datadist.links()]


def call(process: NodeProcess, port: int, cluster_id: int, fill: int, **settings: Any) -> Any:
    """A cluster of that id calls cluster 1."""
    process.call(serve, cluster_id, fill, **settings)
    return process.call(Node.link, port, 1)


@pytest.fixture(params=["cma", "tcp"])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"transfer_path": request.param}


def test_a_second_cluster_of_an_id_is_refused_while_the_first_one_lives(
    node: Node,
    victim: NodeProcess,
    other: NodeProcess,
    settings: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    port = serve(node, 1, 0, **settings)
    assert call(victim, port, 2, MINE, **settings) == SUCCESS
    assert call(other, port, 2, OTHERS, **settings) == LINK_FAILED
    assert other.call(Node.link, port, 1) == LINK_FAILED
    assert "the cluster id 2 is in use" in caplog.text
    assert pulled(node, 2) == MINE
    assert victim.call(pulled, 1) == 0


def test_a_restarted_cluster_gets_in(
    node: Node, victim: NodeProcess, other: NodeProcess, settings: dict[str, Any]
) -> None:
    port = serve(node, 1, 0, **settings)
    assert call(victim, port, 2, OTHERS, **settings) == SUCCESS
    victim.kill()
    assert call(other, port, 2, MINE, **settings) == SUCCESS
    assert pulled(node, 2) == MINE


def links_in_the_end(process: NodeProcess, port: int, status: LLMStatusCode) -> LLMStatusCode:
    """What becomes of calls to a cluster that refuses them for a while."""
    deadline = time.monotonic() + 20
    while status == LINK_FAILED and time.monotonic() < deadline:
        status = process.call(Node.link, port, 1)
    return status


def test_one_that_stands_still_is_taken_over_with_a_warning(
    node: Node,
    victim: NodeProcess,
    other: NodeProcess,
    settings: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of its own host the kernel tells; of another it may be busy, so its silence has to last."""
    port = serve(node, 1, 0, **settings)
    assert call(victim, port, 2, OTHERS, **settings) == SUCCESS
    victim.pause()
    is_told = settings["transfer_path"] == "cma"
    with takes_at_most(5 if is_told else 20):
        status = call(other, port, 2, MINE, **settings)
        assert status == (SUCCESS if is_told else LINK_FAILED)
        assert links_in_the_end(other, port, status) == SUCCESS
    assert "a newcomer takes over the cluster id 2" in caplog.text
    assert pulled(node, 2) == MINE
    victim.resume()
    assert eventually(lambda: victim.call(ids_of) == [])
    assert ids_of(node) == [2]


def hold_the_interpreter(_: Node, seconds: float) -> None:
    """As one long call of an extension does: no other thread of the process runs."""
    libc = ctypes.PyDLL(None)
    libc.usleep(int(seconds * 1e6))


def test_one_that_is_busy_for_seconds_keeps_its_id(
    node: Node,
    victim: NodeProcess,
    other: NodeProcess,
    settings: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    port = serve(node, 1, 0, **settings)
    assert call(victim, port, 2, MINE, **settings) == SUCCESS
    other.call(serve, 2, OTHERS, **settings)
    victim.begin(hold_the_interpreter, 3.0)
    assert other.call(Node.link, port, 1) == LINK_FAILED
    assert other.call(Node.link, port, 1) == LINK_FAILED
    victim.result()
    assert other.call(Node.link, port, 1) == LINK_FAILED
    assert "busy: it has not answered for" in caplog.text
    assert "takes over" not in caplog.text
    assert pulled(node, 2) == MINE
    assert victim.call(pulled, 1) == 0


def test_who_says_no_nonce_gets_in_where_the_other_one_is_gone(
    node: Node, victim: NodeProcess, caplog: pytest.LogCaptureFixture
) -> None:
    port = serve(node, 1, 0)
    assert call(victim, port, 2, OTHERS) == SUCCESS
    victim.pause()
    with Wire.dial(port) as newcomer:
        newcomer.send(hello(cluster_id=2, nonce=b""))
        newcomer.expect(m.Welcome)
    assert "a newcomer takes over the cluster id 2" in caplog.text
    victim.resume()


def test_who_repeats_what_a_linked_cluster_said_is_not_that_cluster(
    node: Node, victim: NodeProcess
) -> None:
    """Its id and its instance are known to all that it ever spoke to."""
    port = serve(node, 1, 0, transfer_path="tcp")
    victims_port = victim.call(serve, 2, MINE, transfer_path="tcp")
    assert victim.call(Node.link, port, 1) == SUCCESS
    with Wire.dial(victims_port) as wire:
        wire.send(hello())
        instance = wire.expect(m.Welcome).instance
    for said in (
        hello(cluster_id=2, instance=instance),
        hello(cluster_id=2),
    ):
        with Wire.dial(port) as wire:
            wire.send(said)
            assert wire.expect(m.Refused).status == LINK_FAILED
    with Wire.dial(port) as wire:
        wire.send(m.Forget(instance, NONCE))
        wire.expect(m.ByeDone)
    assert pulled(node, 2) == MINE


def instance_at(port: int) -> bytes:
    """What the cluster that listens there tells anybody."""
    with Wire.dial(port) as wire:
        wire.send(hello())
        return wire.expect(m.Welcome).instance


def linked_by_hand(wire: Wire, port: int, said: m.Hello) -> bool:
    """Whether the one who says this is linked in the end."""
    wire.send(said)
    try:
        welcome = wire.receive()
        if not isinstance(welcome, m.Welcome):
            return False
        return shaken(wire, port, welcome)
    except EOFError:
        return False


def shaken(wire: Wire, port: int, welcome: m.Welcome) -> bool:
    """Goes on with the hand-shake behind a Welcome."""
    wire.send(m.Ready("tcp"))
    if not isinstance(wire.receive(), m.DialBack):
        return False
    with Wire.dial(port) as reverse:
        reverse.send(m.Attach(welcome.token, is_reverse=True))
        reverse.expect(m.Attached)
        reverse.serve_probe()
        return isinstance(wire.receive(), m.Linked)


@pytest.mark.parametrize("named", [7, None])
def test_a_listener_that_repeats_what_another_peer_said_is_refused(
    node: Node, victim: NodeProcess, named: int | None
) -> None:
    port = victim.call(serve, 1, MINE, transfer_path="tcp")
    node.start(LLMRole.DECODER, 2, transfer_path="tcp")
    assert node.link(port, 1) == SUCCESS
    with impostor(owner(lambda *_: None, instance_at(port))) as forged:
        assert node.link(forged, named) == LINK_FAILED
    assert pulled(node, 1) == MINE
    assert ids_of(node) == [1]


def test_who_is_called_cannot_call_others_in_the_callers_name(
    node: Node, victim: NodeProcess
) -> None:
    """It has all that the caller says, at the very time at which it calls."""
    port = serve(node, 1, 0, transfer_path="tcp")
    victim.call(serve, 2, MINE, transfer_path="tcp")
    assert victim.call(Node.link, port, 1) == SUCCESS
    outcomes: list[bool] = []

    def relay(wire: Wire) -> None:
        said = wire.expect(m.Hello)
        with Wire.dial(port) as other:
            outcomes.append(linked_by_hand(other, port, said))
        wire.hang_up()

    with impostor(relay) as forged:
        victim.call(Node.link, forged, 9)
    assert outcomes == [False]
    assert pulled(node, 2) == MINE


def begun(wire: Wire, port: int, said: m.Hello | m.Forget) -> bytes:
    """The name of a connection on which that was said first."""
    own = wire.socket.getsockname()[1]
    return named(Ends(f"127.0.0.1:{own}", f"127.0.0.1:{port}"), said, b"")


def test_a_connection_is_named_by_what_both_ends_are_and_said_and_by_nothing_less(
    node: Node,
) -> None:
    """Others can have the same addresses behind a tunnel, and on loopback of another host."""
    port = serve(node, 1, 0, transfer_path="tcp")
    with linked_caller(port) as linked:
        name, welcome = begun(linked.control, port, hello()), linked.welcome
        backwards = begun(linked.control, port, hello(nonce=NONCE[::-1]))
        as_called = named(
            Ends(f"127.0.0.1:{port}", f"127.0.0.1:{linked.control.socket.getsockname()[1]}"),
            hello(), b"",
        )  # fmt: skip
        for asked, is_theirs in {
            renamed(name, welcome.instance, welcome.token): True,
            renamed(name, welcome.instance, NONCE): False,
            renamed(name, NONCE, welcome.token): False,
            renamed(backwards, welcome.instance, welcome.token): False,
            renamed(as_called, welcome.instance, welcome.token): False,
            name: False,
            bytes(32): False,
        }.items():
            linked.control.send(m.Vouch(asked))
            assert linked.control.expect(m.Vouched) == m.Vouched(asked, is_theirs)


@pytest.mark.parametrize("nbytes", [0, 31, 33, 300])
def test_a_name_is_of_one_length(node: Node, nbytes: int) -> None:
    port = serve(node, 1, 0, transfer_path="tcp")
    with linked_caller(port) as linked:
        linked.control.send(m.Vouch(bytes(nbytes)))
        assert linked.control.is_ended()


@pytest.mark.parametrize(
    "word", [hello(nonce=OTHER_NONCE), m.Forget(hello().instance, OTHER_NONCE)]
)
def test_who_is_on_a_live_link_is_asked_by_the_name_of_the_newcomers_connection(
    node: Node, word: m.Hello | m.Forget
) -> None:
    port = serve(node, 1, 0, transfer_path="tcp")
    with linked_caller(port) as linked, Wire.dial(port) as newcomer:
        newcomer.send(word)
        name = begun(newcomer, port, word)
        assert linked.control.expect(m.Vouch) == m.Vouch(name)
        linked.control.send(m.Vouched(name, False))
        assert isinstance(newcomer.receive(), (m.Refused, m.ByeDone))


@pytest.mark.parametrize("word", [hello(nonce=b""), m.Forget(hello().instance)])
def test_who_says_no_nonce_has_a_name_that_nobody_answers_to(
    node: Node, word: m.Hello | m.Forget
) -> None:
    """The peer is asked all the same: it may be gone."""
    port = serve(node, 1, 0, transfer_path="tcp")
    with linked_caller(port) as linked, Wire.dial(port) as newcomer:
        newcomer.send(word)
        asked = linked.control.expect(m.Vouch)
        assert asked != m.Vouch(begun(newcomer, port, word))
        linked.control.send(m.Vouched(asked.connection, False))
        assert isinstance(newcomer.receive(), (m.Refused, m.ByeDone))


def test_under_a_secret_a_name_is_of_one_session(node: Node) -> None:
    """A member between two others has a session with each, and so a connection of another name."""
    port = serve(node, 1, 0, transfer_path="tcp", link_security=BY_SECRET)
    with linked_caller(port, dial=KeyedWire.dial) as linked:
        control, welcome = linked.control, linked.welcome
        assert isinstance(control, KeyedWire)
        ends = Ends(f"127.0.0.1:{control.socket.getsockname()[1]}", f"127.0.0.1:{port}")
        for key, is_theirs in ((control.proof(control), True), (bytes(32), False), (b"", False)):
            name = renamed(named(ends, hello(), key), welcome.instance, welcome.token)
            control.send(m.Vouch(name))
            assert control.expect(m.Vouched) == m.Vouched(name, is_theirs)


def test_a_peer_that_vouches_for_a_caller_of_another_host_is_linked_anew_with_a_warning(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    port = serve(node, 1, 0, transfer_path="tcp")
    with linked_caller(port) as linked, Wire.dial(port, "127.0.0.2") as newcomer:
        newcomer.send(hello())
        asked = linked.control.expect(m.Vouch)
        linked.control.send(m.Vouched(asked.connection, True))
        newcomer.expect(m.Welcome)
        assert "linked anew from 127.0.0.2, and was at 127.0.0.1" in caplog.text


def test_a_newcomer_in_a_hurry_does_not_hurry_the_one_that_is_asked(
    node: Node, victim: NodeProcess
) -> None:
    port = serve(node, 1, 0, transfer_path="tcp")
    victim.call(serve, 2, MINE, transfer_path="tcp")
    assert victim.call(Node.link, port, 1) == SUCCESS
    for _ in range(20):
        victim.pause()
        with Wire.dial(port) as wire:
            wire.send(hello(cluster_id=2, timeout_ms=4))
            victim.resume()
            with suppress(EOFError):
                assert isinstance(wire.receive(), m.Refused)
    assert pulled(node, 2) == MINE


def test_a_newcomer_that_began_before_the_other_one_is_asked_about_in_the_end(
    node: Node, victim: NodeProcess
) -> None:
    port = serve(node, 1, 0, transfer_path="tcp")
    with Wire.dial(port) as early:
        early.send(hello(cluster_id=2))
        welcome = early.expect(m.Welcome)
        victim.call(serve, 2, MINE, transfer_path="tcp")
        assert victim.call(Node.link, port, 1) == SUCCESS
        assert not shaken(early, port, welcome)
    assert pulled(node, 2) == MINE
    assert ids_of(node) == [2]


def test_who_says_that_it_is_the_listener_itself_is_not_linked(node: Node) -> None:
    port = serve(node, 1, 0, transfer_path="tcp")
    instance = instance_at(port)
    for cluster_id in (1, 5):
        with Wire.dial(port) as wire:
            said = hello(cluster_id=cluster_id, instance=instance)
            assert not linked_by_hand(wire, port, said)
    assert ids_of(node) == []


def test_newcomers_without_end_keep_no_descriptors_and_cut_no_link(
    node: Node, victim: NodeProcess, settings: dict[str, Any]
) -> None:
    """The peer in whose name they come stands still for a moment; what it is asked is bounded."""
    port = serve(node, 1, 0, **settings)
    assert call(victim, port, 2, MINE, **settings) == SUCCESS
    before = len(os.listdir("/proc/self/fd"))
    victim.pause()
    for _ in range(600):
        with Wire.dial(port) as wire:
            wire.send(hello(cluster_id=2))
    victim.resume()
    assert pulled(node, 2) == MINE
    assert victim.call(pulled, 1) == 0
    assert eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + 2)


def test_who_comes_again_and_again_is_counted_and_warned_of_once(
    node: Node, victim: NodeProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """With the id of another, and with streams of a link that is not made."""
    port = serve(node, 1, 0, transfer_path="tcp")
    assert call(victim, port, 2, MINE, transfer_path="tcp") == SUCCESS
    caplog.clear()
    for _ in range(30):
        with Wire.dial(port) as wire:
            wire.send(hello(cluster_id=2))
            wire.expect(m.Refused)
    for _ in range(30):
        with Wire.dial(port) as wire, Wire.dial(port) as stream:
            wire.send(hello(cluster_id=77))
            stream.send(m.Attach(wire.expect(m.Welcome).token, is_reverse=False))
            stream.expect(m.Attached)
            stream.send_bytes(bytes(8))
            assert stream.is_ended()
    assert eventually(lambda: node.datadist.stats().num_turned_away >= 60)
    warnings = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "1 came with an id that is not theirs, as: the cluster id 2 is in use" in warnings[0]


def test_a_peer_that_asks_without_end_and_reads_nothing_is_unlinked_in_time(node: Node) -> None:
    port = serve(node, 1, 0, transfer_path="tcp", enable_remote_cache_accessible=True)
    with linked_caller(port, is_remote_accessible=True) as greedy:
        greedy.control.socket.settimeout(0.2)
        frame = m.encode(m.Vouch(bytes(32))) * 1000
        with suppress(OSError):  # it is not read any more, or has been cut
            for _ in range(200):
                greedy.control.socket.sendall(frame)
        with takes_at_most(3):
            node.datadist.unlink_clusters([cluster_info(port, 4242)], 1000)
            node.datadist.unlink_clusters([cluster_info(port, 4242)], 1000, force=True)
        with takes_at_most(3):
            node.stop()


def relink(node: Node, port: int, times: int) -> set[Any]:
    """Forgets the link, which the peer cannot know yet, and links again."""
    statuses = set()
    for _ in range(times):
        node.datadist.unlink_clusters([cluster_info(port, 1)], 1000, force=True)
        statuses.add(node.link(port, 1))
    return statuses


def test_a_cluster_that_forgot_its_link_is_the_same_cluster(
    node: Node, victim: NodeProcess, settings: dict[str, Any]
) -> None:
    port = serve(node, 1, 0, **settings)
    assert call(victim, port, 2, MINE, **settings) == SUCCESS
    assert victim.call(relink, port, 50) == {SUCCESS}
    assert ids_of(node) == [2]


def test_a_listener_that_claims_the_id_of_another_peer_is_refused(
    node: Node, victim: NodeProcess
) -> None:
    """The program called it by another id, or by none."""
    port = victim.call(serve, 1, MINE, transfer_path="tcp")
    node.start(LLMRole.DECODER, 2, transfer_path="tcp")
    assert node.link(port, 1) == SUCCESS
    with impostor(owner(lambda *_: None)) as forged:
        assert node.link(forged, 7) == LINK_FAILED
        assert node.link(forged, None) == LINK_FAILED
    assert pulled(node, 1) == MINE


def test_two_peers_of_one_id_that_the_program_names_are_linked_and_said(
    node: Node,
    victim: NodeProcess,
    other: NodeProcess,
    settings: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    ports = [
        process.call(serve, 1, fill, **settings)
        for process, fill in ((victim, OTHERS), (other, MINE))
    ]
    node.start(LLMRole.DECODER, 2, **settings)
    assert [node.link(port, 1) for port in ports] == [SUCCESS] * 2
    assert "two peers have the cluster id 1" in caplog.text
    assert pulled(node, 1) == MINE  # the newest


def test_a_wrong_id_is_said(
    node: Node, victim: NodeProcess, caplog: pytest.LogCaptureFixture
) -> None:
    node.start(LLMRole.DECODER, 2)
    assert node.link(victim.call(serve, 1, MINE), 9) == SUCCESS
    assert "cluster 1 answers" in caplog.text
    assert "and not cluster 9" in caplog.text


# -- one address with two clusters behind it --


@contextmanager
def balanced(ports: list[int]) -> Iterator[int]:
    """One address in front of several listeners: each connection goes to the next of them."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        turns, threads = cycle(ports), []

        def pump(source: socket.socket, sink: socket.socket) -> None:
            with suppress(OSError):
                while data := source.recv(65536):
                    sink.sendall(data)
            for sock in (source, sink):
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    ends = server.accept()[0], socket.create_connection(("127.0.0.1", next(turns)))
                    for end in ends:
                        stack.enter_context(end)
                    for pair in (ends, ends[::-1]):
                        threads.append(threading.Thread(target=pump, args=pair, daemon=True))
                        threads[-1].start()

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        accepting.join()


def test_a_stream_that_leads_to_another_cluster_fails_the_link_and_names_both(
    node: Node, victim: NodeProcess, other: NodeProcess, caplog: pytest.LogCaptureFixture
) -> None:
    ports = [
        process.call(serve, cluster_id, MINE, transfer_path="tcp")
        for process, cluster_id in ((victim, 1), (other, 11))
    ]
    node.start(LLMRole.DECODER, 2, transfer_path="tcp")
    with balanced(ports) as port:
        assert node.link(port, 1) == LINK_FAILED
    assert f"127.0.0.1:{port} leads to cluster 1" in caplog.text
    assert "cluster 11 has no such link" in caplog.text


def test_an_address_that_leads_to_a_second_live_cluster_is_refused_with_both_names(
    node: Node, victim: NodeProcess, other: NodeProcess, caplog: pytest.LogCaptureFixture
) -> None:
    ports = [
        process.call(serve, cluster_id, fill)
        for process, cluster_id, fill in ((victim, 1, MINE), (other, 11, OTHERS))
    ]
    node.start(LLMRole.DECODER, 2)
    with balanced(ports) as port:
        assert node.link(port, 1) == SUCCESS
        assert node.link(port, 11) == LINK_FAILED
    assert "leads to two clusters: 1," in caplog.text
    assert "and 11," in caplog.text
    assert pulled(node, 1) == MINE


# -- under TLS --


class Ca:
    """An authority whose certificates may name clusters, made as docs/security.md says."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._run(
            *self._request("ca"), "-x509", "-subj", "/CN=ca", "-days", "2", "-out", "ca.pem",
        )  # fmt: skip

    def option(self, name: str, *cluster_ids: int) -> str:
        """The `link_security` of a new member."""
        self._run(*self._request(name), "-subj", f"/CN={name}", "-out", f"{name}.csr")
        named = ",".join(f"URI:llm-datadist:cluster:{each}" for each in cluster_ids)
        extension = f"subjectAltName={named or 'DNS:member.example'}"
        (self._folder / f"{name}.ext").write_text(extension)
        self._run(
            "x509", "-req", "-in", f"{name}.csr", "-extfile", f"{name}.ext", "-CA", "ca.pem",
            "-CAkey", "ca.key", "-CAcreateserial", "-days", "1", "-out", f"{name}.pem",
        )  # fmt: skip
        files = {"ca": "ca.pem", "certificate": f"{name}.pem", "key": f"{name}.key"}
        return json.dumps({kind: str(self._folder / file) for kind, file in files.items()})

    def dialer(self, option: str) -> Callable[[int], Wire]:
        """Calls as that member."""
        files = json.loads(option)
        context = ssl.create_default_context(cafile=files["ca"])
        context.check_hostname = False
        context.load_cert_chain(files["certificate"], files["key"])

        def dial(port: int) -> Wire:
            sock = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
            wire = Wire(context.wrap_socket(sock))
            wire.receive_bytes(1)  # the listener's word that we may link
            return wire

        return dial

    def _request(self, name: str) -> list[str]:
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        return ["req", *key, "-keyout", f"{name}.key"]

    def _run(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self._folder, check=True, capture_output=True)


def test_a_certificate_that_names_clusters_is_for_no_other(
    node: Node, victim: NodeProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ca = Ca(tmp_path)
    port = serve(node, 1, 0, link_security=ca.option("one", 1))
    security = ca.option("two", 2, 22)
    assert call(victim, port, 3, MINE, link_security=security) == LINK_FAILED
    assert "says that it is cluster 3, and its certificate is for 2, 22" in caplog.text
    victim.call(Node.stop)
    assert call(victim, port, 22, MINE, link_security=security) == SUCCESS


def test_a_listener_whose_certificate_is_for_another_cluster_is_not_linked_to(
    node: Node, victim: NodeProcess, tmp_path: Path
) -> None:
    ca = Ca(tmp_path)
    port = victim.call(serve, 1, MINE, link_security=ca.option("one", 11))
    node.start(LLMRole.DECODER, 2, link_security=ca.option("two"))
    assert node.link(port, 1) == LINK_FAILED
    assert ids_of(node) == []


@pytest.mark.parametrize(("named", "status"), [((), LINK_FAILED), ((2,), SUCCESS)])
def test_an_id_belongs_to_the_certificate_on_its_live_link(
    node: Node,
    victim: NodeProcess,
    other: NodeProcess,
    tmp_path: Path,
    named: tuple[int, ...],
    status: LLMStatusCode,
) -> None:
    """Also while that link's peer stands still; a certificate that names the id may have it."""
    ca = Ca(tmp_path)
    port = serve(node, 1, 0, link_security=ca.option("one"))
    assert call(victim, port, 2, MINE, link_security=ca.option("two")) == SUCCESS
    victim.pause()
    try:
        assert call(other, port, 2, OTHERS, link_security=ca.option("thief", *named)) == status
    finally:
        victim.resume()
    if status is LINK_FAILED:
        assert pulled(node, 2) == MINE


def test_a_member_of_another_certificate_does_not_have_the_id_by_anybodys_word(
    node: Node, victim: NodeProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even by that of the peer on the live link: a word passes through more hands."""
    ca = Ca(tmp_path)
    port = serve(node, 1, 0, link_security=ca.option("one"))
    theirs = victim.call(serve, 2, MINE, link_security=ca.option("two"))
    assert node.link(theirs, 2) == SUCCESS
    ca.option("two")  # renewed, in place of the former one
    assert victim.call(Node.link, port, None) == LINK_FAILED
    assert "the cluster id 2 belongs to another certificate while its link lives" in caplog.text
    ca.option("two", 2)
    assert victim.call(Node.link, port, None) == SUCCESS


def test_a_member_of_another_certificate_has_nobody_asked_to_forget_a_link(
    node: Node, tmp_path: Path
) -> None:
    """Whatever it would say of it."""
    ca = Ca(tmp_path)
    port = serve(node, 1, 0, transfer_path="tcp", link_security=ca.option("one"))
    two, thief = (ca.dialer(ca.option(*who)) for who in (("two", 2), ("thief", 77)))
    with linked_caller(port, cluster_id=2, dial=two) as linked:
        for dial, is_asked in ((thief, False), (two, True)):
            with dial(port) as caller:
                forget = m.Forget(linked.hello.instance, OTHER_NONCE)
                caller.send(forget)
                if is_asked:
                    name = begun(caller, port, forget)
                    assert linked.control.expect(m.Vouch) == m.Vouch(name)
                else:
                    caller.expect(m.ByeDone)
