"""Hostile listeners: a caller ends with a link to the process that was named, or with none to it.

The name of a same-host socket can be anybody's, or nobody's; who listens there is another matter.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from keyed_wire import BY_SECRET, KeyedWire
from same_host_wire import SHAPE, Memory, linked_ids, start, welcome_of
from wire import NONCE, PATIENCE_S, PROBE, Wire, impostor

from isolation import become, needs_root
from llm_datadist import BlocksCacheKey, LLMException, LLMStatusCode
from llm_datadist.core import messages as m
from llm_datadist.testing.cluster import Node, NodeProcess, make_array
from llm_datadist.transport.same_host import SameHost, SameHostOffer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SUCCESS = LLMStatusCode.LLM_SUCCESS
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK
CALLER, NEIGHBOUR, HOSTILE = 1, 2, 9
INSTANCE = b"a hostile listen"


def welcome(offer: bytes, instance: bytes = INSTANCE, probe: m.ProbeTarget = PROBE) -> m.Welcome:
    offers = {"cma": offer, "tcp": b""}
    return m.Welcome(m.PROTOCOL_VERSION, HOSTILE, instance, NONCE, offers, probe)


def saying(what: m.Welcome, heard: list[m.AnyMessage]) -> Callable[[Wire], None]:
    """For `impostor`: a listener that says this, keeps the answer, and links over TCP if it may."""

    def serve(wire: Wire) -> None:
        first = wire.receive()
        if isinstance(first, m.Hello):
            wire.send(what)
            heard.append(wire.receive())
            if isinstance(heard[-1], m.Ready):
                wire.send(m.Linked("tcp"))
            wire.is_ended()
        else:
            assert isinstance(first, m.Attach), first
            wire.send(m.Attached())
            wire.serve_probe()
            wire.is_ended()

    return serve


@pytest.fixture(scope="module")
def processes() -> Iterator[list[NodeProcess]]:
    with NodeProcess() as one, NodeProcess() as other:
        yield [one, other]


@pytest.fixture
def caller(processes: list[NodeProcess]) -> Iterator[NodeProcess]:
    """A cluster that will be lied to. It listens as well."""
    processes[0].call(start, CALLER)
    yield processes[0]
    processes[0].call(Node.stop)


@pytest.fixture
def neighbour(processes: list[NodeProcess]) -> Iterator[m.Welcome]:
    """Another cluster, as it says of itself."""
    yield welcome_of(processes[1].call(start, NEIGHBOUR))
    processes[1].call(Node.stop)


def paths(node: Node) -> list[tuple[int, str, str]]:
    return [(link.cluster_id, link.path, link.path_reason) for link in node.datadist.links()]


def pulled(node: Node, cluster_id: int) -> LLMException | np.ndarray:
    """What a pull brings from a cluster's first cache, or why it does not."""
    cache, blocks = node.blocks_cache(*SHAPE), list(range(SHAPE[1]))
    try:
        node.manager.pull_blocks(BlocksCacheKey(cluster_id), cache, blocks, blocks)
    except LLMException as error:
        return error
    return node.arrays[cache.cache_id]


# -- what a Welcome says ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "says"),
    [
        ("neighbour", "cluster 2 answers there, and not the process that was called"),
        ("nobody", "the peer is in another network namespace"),
        (b"\xc1", "the peer's offer cannot be read"),
        (b"\x92\xa0\xc4\x0f" + bytes(15), "the peer's offer cannot be read"),
        (b"\x92\xa0\xc4\x11" + bytes(17), "the peer's offer cannot be read"),
        (SameHost(b"").offer(), "the peer's offer cannot be read"),
        (b"\x93\xa0\xc4\x10" + bytes(16) + 5000 * b"\x91" + b"\xc0", "offer cannot be read"),
    ],
    ids=["neighbour", "nobody", "garbage", "short-name", "long-name", "no-name", "nested"],
)
def test_who_names_a_socket_that_is_not_its_own_is_linked_over_tcp(
    caller: NodeProcess,
    neighbour: m.Welcome,
    processes: list[NodeProcess],
    of: str | bytes,
    says: str,
) -> None:
    named = {"neighbour": neighbour.offers["cma"], "nobody": SameHost.new().offer()}
    offer = of if isinstance(of, bytes) else named[of]
    heard: list[m.AnyMessage] = []
    with impostor(saying(welcome(offer), heard)) as port:
        assert caller.call(Node.link, port, HOSTILE) == SUCCESS
        [(cluster_id, path, reason)] = caller.call(paths)
        assert (cluster_id, path) == (HOSTILE, "tcp")
        assert says in reason
        assert processes[1].call(linked_ids) == []
        caller.call(Node.unlink, port, HOSTILE, force=True)
    assert proposed(heard) == ["tcp"]


def refusing(status: LLMStatusCode) -> Callable[[Wire, m.Welcome], None]:
    def serve(wire: Wire, _: m.Welcome) -> None:
        wire.expect(m.Hello)
        wire.send(m.Refused(status, "made up"))

    return serve


def welcoming(wire: Wire, said: m.Welcome) -> None:
    wire.expect(m.Hello)
    wire.send(said)


@pytest.mark.parametrize(
    ("serve", "says"),
    [
        (lambda *_: None, "did not answer in the peer's name"),
        (refusing(LLMStatusCode.LLM_ALREADY_LINK), "made up"),
        (refusing(LLMStatusCode.LLM_TIMEOUT), "made up"),
        (refusing(LLMStatusCode.LLM_PARAM_INVALID), "made up"),
        (welcoming, "cluster 9 answers there, and not the process that was called"),
    ],
    ids=["silent", "linked-already", "timeout", "invalid", "another-instance"],
)
def test_who_took_the_name_does_not_say_what_becomes_of_the_call(
    caller: NodeProcess, serve: Callable[[Wire, m.Welcome], None], says: str
) -> None:
    """Each cluster tells its name to whoever asks, and on another host anybody can take it."""
    at = SameHost.new()
    with impostor(saying(welcome(at.offer()), [])) as port, at.listen() as listening:
        listening.settimeout(PATIENCE_S)
        caller.begin(Node.link, port, HOSTILE, 2000)
        with Wire(listening.accept()[0]) as squatter:
            serve(squatter, welcome(b"", b"not the instance"))
            assert caller.result() == SUCCESS
        [(_, path, reason)] = caller.call(paths)
        assert path == "tcp"
        assert says in reason
        caller.call(Node.unlink, port, HOSTILE, force=True)


def test_a_socket_of_another_host_is_not_looked_for(caller: NodeProcess) -> None:
    at = SameHost.new()
    offer = msgspec.msgpack.encode(SameHostOffer("another host", at.id))
    with impostor(saying(welcome(offer), [])) as port, at.listen() as listening:
        assert caller.call(Node.link, port, HOSTILE) == SUCCESS
        assert caller.call(paths) == [(HOSTILE, "tcp", "cma: the peer is on another host")]
        with pytest.raises(BlockingIOError):
            listening.accept()
        caller.call(Node.unlink, port, HOSTILE, force=True)


@needs_root
def test_a_process_of_another_user_at_the_name_is_told_nothing(
    caller: NodeProcess, mortal: NodeProcess
) -> None:
    at = SameHost.new()
    mortal.call(squat_as, 65534, at.offer())
    with impostor(saying(welcome(at.offer()), [])) as port:
        assert caller.call(Node.link, port, HOSTILE) == SUCCESS
        [(_, path, reason)] = caller.call(paths)
        assert path == "tcp"
        assert "run both processes as the same user (here 0, the peer 65534)" in reason
        assert mortal.call(overheard, 1) == [b""]
        caller.call(Node.unlink, port, HOSTILE, force=True)


def test_who_says_that_it_is_the_neighbour_is_not_part_of_the_link(
    caller: NodeProcess, neighbour: m.Welcome, processes: list[NodeProcess]
) -> None:
    heard: list[m.AnyMessage] = []
    with impostor(saying(welcome(neighbour.offers["cma"], neighbour.instance), heard)) as port:
        assert caller.call(Node.link, port, NEIGHBOUR) == SUCCESS
    assert heard == [m.Moved()]
    assert caller.call(paths) == [(NEIGHBOUR, "cma", "")]
    assert processes[1].call(linked_ids) == [CALLER]
    np.testing.assert_array_equal(caller.call(pulled, NEIGHBOUR), make_array(SHAPE, NEIGHBOUR))


def test_who_says_that_it_is_the_caller_itself_is_not_part_of_a_link(caller: NodeProcess) -> None:
    heard: list[m.AnyMessage] = []
    endpoint = caller.call(endpoint_of)
    itself = welcome_of(endpoint)
    with impostor(saying(welcome(itself.offers["cma"], itself.instance), heard)) as port:
        caller.call(Node.link, port, HOSTILE)
        assert HOSTILE not in caller.call(linked_ids)
    assert proposed(heard) == []


def proposed(heard: list[m.AnyMessage]) -> list[str]:
    """The paths that a caller has verified."""
    return [each.path for each in heard if isinstance(each, m.Ready)]


def endpoint_of(node: Node) -> int:
    endpoint = node.datadist.listen_endpoint
    assert endpoint is not None
    return endpoint.port


# -- who has taken the name since ------------------------------------------------------------------


def squat(node: Node, offer: bytes) -> None:
    """Takes the name of a socket that nobody listens on any more."""
    sock = SameHost.offered(offer)[0].listen()
    sock.settimeout(PATIENCE_S)
    node.squatted = sock  # type: ignore[attr-defined]  # for the call that comes


def squat_as(node: Node, uid: int, offer: bytes) -> None:
    become(node, uid)
    squat(node, offer)


def overheard(node: Node, count: int) -> list[bytes]:
    """What so many callers say before they leave."""
    said = []
    for _ in range(count):
        with node.squatted.accept()[0] as sock:  # type: ignore[attr-defined]
            sock.settimeout(PATIENCE_S)
            said.append(b"".join(iter(lambda: sock.recv(4096), b"")))
    node.squatted.close()  # type: ignore[attr-defined]
    return said


def test_streams_of_a_link_lead_to_its_process_and_to_no_other(
    caller: NodeProcess, processes: list[NodeProcess]
) -> None:
    """Whoever has the name of its socket by now is not told the link's token, either."""
    at, mine = SameHost.new(), Memory()
    with impostor(saying(welcome(at.offer()), [])) as port, at.listen() as listening:
        listening.settimeout(PATIENCE_S)
        caller.begin(Node.link, port, HOSTILE)
        with Wire(listening.accept()[0]) as control:
            control.expect(m.Hello)
            control.send(welcome(b"", probe=mine.probe))
            control.expect(m.Ready)
            control.send(m.Linked("cma"))
            assert caller.result() == SUCCESS
            assert caller.call(paths) == [(HOSTILE, "cma", "")]
            listening.close()
            processes[1].call(squat, at.offer())
            control.send(m.DialBack(1))
            caller.begin(pulled, HOSTILE)
            assert processes[1].call(overheard, 2) == [b"", b""]
            failure = caller.result()
    assert isinstance(failure, LLMException)
    assert failure.status_code == NOT_YET_LINK
    assert "is another process's by now" in str(failure)


def test_a_squatter_without_the_credential_is_not_linked_to(
    processes: list[NodeProcess], mortal: NodeProcess
) -> None:
    """A member sends a caller to the socket of a cluster that is dead, which somebody took."""
    caller = processes[0]
    caller.call(start, CALLER, link_security=BY_SECRET)
    with KeyedWire.dial(mortal.call(start, NEIGHBOUR, link_security=BY_SECRET)) as wire:
        wire.send(m.Hello(m.PROTOCOL_VERSION, 3, NONCE, True, True, 1000, {}, PROBE))
        dead = wire.expect(m.Welcome)
    mortal.kill()
    heard: list[m.AnyMessage] = []

    def serve(wire: Wire) -> None:
        keyed = KeyedWire(wire.socket, is_caller=False)
        keyed.expect(m.Hello)
        named = {"cma": dead.offers["cma"]}
        keyed.send(m.Welcome(m.PROTOCOL_VERSION, NEIGHBOUR, dead.instance, NONCE, named, PROBE))
        heard.append(keyed.receive())

    at, _ = SameHost.offered(dead.offers["cma"])
    try:
        with impostor(serve) as port, at.listen() as listening:
            listening.settimeout(PATIENCE_S)
            caller.begin(Node.link, port, NEIGHBOUR)
            with Wire(listening.accept()[0]) as squatter:
                squatter.receive_bytes(40)
                squatter.send_bytes(bytes(64))
                assert squatter.is_ended()
            assert caller.result() == LLMStatusCode.LLM_LINK_FAILED
        [refused] = heard
        assert isinstance(refused, m.Refused)
        assert "link security: it does not know the shared secret" in refused.message
        assert caller.call(linked_ids) == []
    finally:
        caller.call(Node.stop)


@pytest.fixture
def mortal() -> Iterator[NodeProcess]:
    with NodeProcess() as process:
        yield process


# -- commands as callers ---------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llm_datadist", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_doctor_is_not_sent_to_the_neighbour(
    neighbour: m.Welcome, processes: list[NodeProcess]
) -> None:
    heard: list[m.AnyMessage] = []
    with impostor(saying(welcome(neighbour.offers["cma"]), heard)) as port:
        said = json.loads(run("doctor", "--peer", f"127.0.0.1:{port}", "--json").stdout)
    [path] = [found for found in said["findings"] if found["name"] == "path"]
    assert path["data"]["path"] == "tcp"
    assert "not the process that was called" in path["remedy"]
    assert proposed(heard) == ["tcp"]
    assert processes[1].call(linked_ids) == []


def test_top_meets_nobody() -> None:
    """It asks over TCP, and takes nothing but an answer."""
    at = SameHost.new()

    def serve(wire: Wire) -> None:
        wire.expect(m.AskStats)
        wire.send(welcome(at.offer()))
        wire.is_ended()

    with impostor(serve) as port, at.listen() as listening:
        done = run("top", "--json", f"127.0.0.1:{port}")
        assert done.returncode == 3
        assert "answered Welcome" in done.stdout
        with pytest.raises(BlockingIOError):
            listening.accept()
