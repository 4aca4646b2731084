"""Made-up bytes at the port: nobody is harmed, nothing is kept, nobody waits."""

from __future__ import annotations

import json
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up import authentic, greetings, mutations, said, tls_option
from wire import Wire, columns, linked_caller

from llm_datadist import BlocksCacheKey, LLMException, LLMRole, LLMStatusCode
from llm_datadist.core import messages as m
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, addrs_of, make_array
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SUCCESS = LLMStatusCode.LLM_SUCCESS
KEY = BlocksCacheKey(1, 0)
SHAPE = (2, 8, 4096)
SECRET = "a secret of more than sixteen bytes"
#: what takes no waiting, on a busy machine
SOON_S = 2.0


class Siege:
    """An owner that strangers talk to, and a puller that is linked to it, over tcp."""

    def __init__(self, stack: ExitStack, security: str) -> None:
        self.security = security
        self.owner = stack.enter_context(NodeProcess())
        given: dict[str, Any] = {
            "transfer_path": "tcp", "sync_kv_timeout": 2000, "link_security": security,
        }  # fmt: skip
        self.port = self.owner.call(
            Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **given
        )
        self.cache_id, self.addrs = self.owner.call(publish)
        self.node = Node()
        stack.callback(self.node.stop)
        self.node.start(LLMRole.DECODER, 2, **given)
        self._cache = self.node.blocks_cache(*SHAPE)
        assert self.node.link(self.port, 1) == SUCCESS
        assert self.pulls()

    def pulls(self) -> bool:
        array = self.node.arrays[self._cache.cache_id]
        array[:] = 0
        blocks = list(range(SHAPE[1]))
        self.node.manager.pull_blocks(KEY, self._cache, blocks, blocks[::-1])
        return bool(np.array_equal(array, owned()[:, ::-1]))

    @contextmanager
    def meanwhile(self) -> Iterator[None]:
        """The link moves the right bytes, all the time."""
        ended = threading.Event()

        def work() -> int:
            times = 0
            while not ended.is_set() or not times:
                with takes_at_most(SOON_S):
                    assert self.pulls()
                times += 1
            return times

        with ThreadPoolExecutor(1) as pool:
            pulling = pool.submit(work)
            try:
                yield
            finally:
                ended.set()
            assert pulling.result(10) > 0

    def relinks(self) -> bool:
        assert self.node.unlink(self.port, 1) == SUCCESS
        with takes_at_most(SOON_S):
            assert self.node.link(self.port, 1) == SUCCESS
        return self.pulls()


def publish(node: Node) -> tuple[int, list[int]]:
    cache = node.blocks_cache(*SHAPE, seed=1, key=BlocksCacheKey(0, 0))
    return cache.cache_id, addrs_of(node.arrays[cache.cache_id])


def owned() -> Bytes:
    return make_array(SHAPE, 1)


def descriptors(_: Node) -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_nbytes(_: Node) -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module", params=["open", "secret", "tls"])
def siege(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Siege]:
    options: dict[str, Callable[[], str]] = {
        "open": lambda: "",
        "secret": lambda: json.dumps({"secret": SECRET}),
        "tls": lambda: tls_option(tmp_path_factory.mktemp("tls")),
    }
    with ExitStack() as stack:
        yield Siege(stack, options[request.param]())


def what_comes(wire: Wire, data: bytes, pieces: int) -> bytes:
    """Says it in pieces, then no more; the answer, until the other end closes the connection."""
    came = b""
    step = -(-len(data) // pieces) or 1
    with suppress(ConnectionError):  # it has heard enough
        for start in range(0, len(data), step):
            wire.send_bytes(data[start : start + step])
        with suppress(OSError):  # it has hung up
            wire.socket.shutdown(socket.SHUT_WR)
        while more := wire.socket.recv(65536):
            came += more
    return came


MAGIC = m.HEADER.pack(m.MAGIC, 0)[:4]

port_examples = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_strangers_who_make_things_up_harm_nobody(siege: Siege) -> None:
    before = siege.owner.call(descriptors), siege.owner.call(resident_nbytes)
    first = mutations(greetings(siege.security))

    @port_examples
    @given(first, said, st.integers(1, 5))
    def strangers(greeting: bytes, rest: bytes, pieces: int) -> None:
        with Wire.dial(siege.port) as wire, takes_at_most(SOON_S):
            came = what_comes(wire, greeting + rest, pieces)
        if siege.security:
            assert MAGIC not in came, "a word of ours before the credential"

    with siege.meanwhile():
        strangers()
    assert [link.cluster_id for link in siege.node.datadist.links()] == [1]
    assert siege.relinks()
    assert eventually(lambda: siege.owner.call(descriptors) <= before[0] + 4)
    assert siege.owner.call(resident_nbytes) - before[1] < 50_000_000


def test_peers_with_the_secret_who_make_things_up_harm_nobody(siege: Siege) -> None:
    if "ca" in siege.security:
        pytest.skip("over TLS the same frames are read by the same code")
    before = siege.owner.call(descriptors)

    @port_examples
    @given(said, st.integers(1, 5))
    def peers(data: bytes, pieces: int) -> None:
        with authentic(siege.port, SECRET if siege.security else "") as wire, takes_at_most(SOON_S):
            came = what_comes(wire, data, pieces)
        assert owned()[0, 0, :64].tobytes() not in came

    with siege.meanwhile():
        peers()
    assert siege.relinks()
    assert eventually(lambda: siege.owner.call(descriptors) <= before + 4)


def test_linked_peers_get_the_bytes_of_the_cache_or_a_refusal(siege: Siege) -> None:
    """Whatever addresses they read at, near the ends of what is registered and far from them."""
    if siege.security:
        pytest.skip("a link by hand has no security")
    near = st.integers(-80, 80)
    at = st.sampled_from([0, SHAPE[1] * SHAPE[2] // 2, SHAPE[1] * SHAPE[2]])
    length = st.integers(1, 160) | st.integers(1, 2**64 - 1)
    pairs = st.lists(st.tuples(st.sampled_from([0, 1]), at, near, length), min_size=1, max_size=4)
    source, size = owned().reshape(-1), SHAPE[1] * SHAPE[2]

    with linked_caller(siege.port) as caller, siege.meanwhile():
        stream = caller.attach()
        stream.send(m.Resolve(siege.cache_id, 0, 0, False))
        info = stream.expect(m.Resolved).info

        @settings(max_examples=300, deadline=None)
        @given(pairs)
        def reads(asked: list[tuple[int, int, int, int]]) -> None:
            spans = [(t, at + near, length) for t, at, near, length in asked]
            addrs = [((siege.addrs[t] + begin) % 2**64, n) for t, begin, n in spans]
            stream.send(m.Read(info.cache_id, info.generation, 1000, columns(addrs)))
            answer = stream.receive()
            whole = [(t * size + begin, nbytes) for t, begin, nbytes in spans]
            if isinstance(answer, m.Sending):  # the tensors are neighbours: from one into the other
                assert all(b >= 0 and b + n <= 2 * size for b, n in whole), spans
                expected = b"".join(source[b : b + n].tobytes() for b, n in whole)
                assert stream.receive_bytes(answer.nbytes) == expected
                assert stream.receive_bytes(16)[8:] == bytes(8)
            else:
                assert isinstance(answer, m.Refused), answer
                assert not all(begin >= 0 and begin + n <= size for _, begin, n in spans), spans

        reads()


def test_linked_peers_who_make_things_up_harm_nobody(siege: Siege) -> None:
    if siege.security:
        pytest.skip("a link by hand has no security")
    before = siege.owner.call(descriptors)

    @port_examples
    @given(said, st.integers(1, 5))
    def peers(data: bytes, pieces: int) -> None:
        stream = caller.attach()
        with takes_at_most(SOON_S):
            what_comes(stream, data, pieces)
        stream.socket.close()

    with linked_caller(siege.port) as caller, siege.meanwhile():
        peers()
    assert siege.owner.call(intact), "what was registered is as it was"
    assert siege.relinks()
    assert eventually(lambda: siege.owner.call(descriptors) <= before + 4)


def intact(node: Node) -> bool:
    return bool(np.array_equal(node.arrays[1], owned()))


def test_a_pull_through_it_all_says_what_was_wrong_if_the_owner_goes(siege: Siege) -> None:
    """Not a hang: the last test of a siege ends it."""
    siege.owner.kill()
    with takes_at_most(3.0), pytest.raises(LLMException) as error:
        siege.pulls()
    assert error.value.status_code == LLMStatusCode.LLM_NOT_YET_LINK
