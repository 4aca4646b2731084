"""Strangers at the port: what they send harms nobody, and honest peers are served meanwhile."""

from __future__ import annotations

import os
import resource
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from wire import NONCE, Wire, columns, hello, linked_caller

from llm_datadist import BlocksCacheKey, CacheDesc, DataType, LLMRole, LLMStatusCode
from llm_datadist.core import messages as m
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, addrs_of, make_array
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from wire import LinkedCaller

SUCCESS = LLMStatusCode.LLM_SUCCESS
PARAM_INVALID = LLMStatusCode.LLM_PARAM_INVALID
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK

#: more than a socket's buffer, so that workers send it
SHAPE = (2, 8, 1 << 19)
#: what takes no waiting, on a busy machine
SOON_S = 2.0


@pytest.fixture(scope="module")
def owner_process() -> Iterator[NodeProcess]:
    with NodeProcess() as process:
        yield process


@pytest.fixture
def owner(owner_process: NodeProcess) -> Iterator[NodeProcess]:
    """The process whose node ends with the test."""
    yield owner_process
    owner_process.call(Node.stop)


@pytest.fixture
def port(node: Node, owner: NodeProcess) -> int:
    """An owner in another process, to which a node here is linked.

    Over tcp, where each pull needs what strangers try to take: the port, the loop, the threads.
    """
    settings: dict[str, Any] = {"transfer_path": "tcp", "sync_kv_timeout": 5000}
    port = owner.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    owner.call(publish)
    node.start(LLMRole.DECODER, 2, **settings)
    assert node.link(port, 1) == SUCCESS
    return port


def publish(node: Node) -> None:
    node.blocks_cache(*SHAPE, seed=1, key=BlocksCacheKey(0, 0))


@cache
def what_is_owned() -> Bytes:
    return make_array(SHAPE, 1)


def pulls(node: Node) -> bool:
    mine = node.blocks_cache(*SHAPE)
    blocks = list(range(SHAPE[1]))
    node.manager.pull_blocks(BlocksCacheKey(1, 0), mine, blocks, blocks[::-1])
    right = np.array_equal(node.arrays[mine.cache_id], what_is_owned()[:, ::-1])
    node.manager.unregister_cache(mine.cache_id)
    return right


def relinks(node: Node, port: int) -> bool:
    """Whether a new link is made soon and works."""
    assert node.unlink(port, 1) == SUCCESS
    with takes_at_most(SOON_S):
        assert node.link(port, 1) == SUCCESS
    return pulls(node)


def descriptors(_: Node) -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_nbytes(_: Node) -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


# -- what strangers say ----------------------------------------------------------------------------

BAD_TEXT = m.encode(m.Ready("abcd")).replace(b"abcd", b"\xff\xfe\xff\xfe")
HELLO = m.encode(hello())
BODY = m.HEADER.size
#: what msgpack never uses stands where the version does
BAD_HELLO = HELLO[: BODY + 2] + b"\xc1" + HELLO[BODY + 3 :]
DEEP = m.HEADER.pack(m.MAGIC, 60_000) + b"\x91" * 60_000


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(np.random.default_rng(1).bytes(4096), id="random"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", id="http"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), id="tls"),
        pytest.param(b"\0" * 64, id="zeros"),
        pytest.param(m.HEADER.pack(m.MAGIC, 2**32 - 1), id="huge-length"),
        pytest.param(
            m.HEADER.pack(m.MAGIC, m.MAX_GREETING_NBYTES + 1) + bytes(1000), id="above-the-cap"
        ),
        pytest.param(m.HEADER.pack(m.MAGIC, 0), id="empty-body"),
        pytest.param(m.HEADER.pack(m.MAGIC, 3) + b"\xff\xff\xff", id="no-msgpack"),
        pytest.param(DEEP, id="deeply-nested"),
        pytest.param(BAD_TEXT, id="bad-text"),
        pytest.param(BAD_HELLO, id="bad-hello"),
        pytest.param(HELLO + b"nonsense", id="nonsense-after-hello"),
        pytest.param(HELLO * 2, id="hello-twice"),
        pytest.param(HELLO + m.encode(m.Linked("tcp")), id="linked-by-itself"),
    ],
)
def test_nonsense_is_dropped_and_harms_nobody(
    node: Node, owner: NodeProcess, port: int, said: bytes
) -> None:
    assert pulls(node)
    before = owner.call(descriptors), owner.call(resident_nbytes)
    for _ in range(20):
        with Wire.dial(port) as wire:
            wire.send_bytes(said)
            with takes_at_most(SOON_S):
                assert wire.is_ended()
    assert pulls(node)
    assert owner.call(resident_nbytes) - before[1] < 50_000_000
    assert eventually(lambda: owner.call(descriptors) < before[0] + 10)
    assert relinks(node, port)


@pytest.mark.parametrize(
    "message",
    [
        m.Linked("tcp"),
        m.Bye(),
        m.ListCaches(),
        m.Resolve(1, 0, 0, False),
        m.Read(1, 1, 1000, columns([(4096, 8)])),
        m.Refused(0, "x" * 4096),
        m.Sending(2**40),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_that_cannot_be_first_is_refused(port: int, message: m.Message) -> None:
    with Wire.dial(port) as wire, takes_at_most(SOON_S):
        wire.send(message)
        refused = wire.expect(m.Refused)
        assert refused.status == LLMStatusCode.LLM_FAILED
        assert type(message).__name__ in refused.message
        assert wire.is_ended()


@pytest.mark.parametrize("is_reverse", [False, True])
def test_a_token_that_names_no_link_gets_no_stream(node: Node, port: int, is_reverse: bool) -> None:
    with Wire.dial(port) as wire, takes_at_most(SOON_S):
        wire.send(m.Attach(NONCE, is_reverse))
        assert wire.expect(m.Refused).status == NOT_YET_LINK
        assert wire.is_ended()
    assert pulls(node)


@pytest.mark.parametrize(
    ("greeting", "says"),
    [
        (hello(version=2), "install the same release"),
        (hello(is_remote_accessible=True), "set it alike on both"),
    ],
)
def test_terms_that_differ_are_refused_by_the_listener(
    node: Node, port: int, greeting: m.Hello, says: str
) -> None:
    with Wire.dial(port) as wire, takes_at_most(SOON_S):
        wire.send(greeting)
        refused = wire.expect(m.Refused)
        assert refused.status == PARAM_INVALID
        assert says in refused.message
        assert wire.is_ended()
    assert pulls(node)


def test_forgetting_somebody_elses_link_needs_to_know_it(node: Node, port: int) -> None:
    with Wire.dial(port) as wire:
        wire.send(m.Forget(NONCE, NONCE))
        wire.expect(m.ByeDone)
        assert wire.is_ended()
    assert len(node.datadist.links()) == 1
    assert pulls(node)


# -- what strangers do not say ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"", id="silent"),
        pytest.param(m.encode(hello())[:-1], id="nearly-a-frame"),
        pytest.param(m.encode(hello()), id="silent-after-hello"),
    ],
)
def test_a_hundred_half_open_connections_hold_up_nobody(
    node: Node, owner: NodeProcess, port: int, said: bytes
) -> None:
    assert relinks(node, port)
    before = owner.call(descriptors)
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(Wire.dial(port)).send_bytes(said)
        with takes_at_most(SOON_S):
            assert pulls(node)
        assert relinks(node, port)
    assert eventually(lambda: owner.call(descriptors) < before + 10)


def test_hand_shakes_that_stop_in_the_probe_hold_up_nobody(
    node: Node, owner: NodeProcess, port: int
) -> None:
    """The owner waits for each to open a stream, for as long as it said it would take."""
    assert relinks(node, port)
    before = owner.call(descriptors)
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire.dial(port)) for _ in range(40)]
        for index, wire in enumerate(wires):
            wire.send(hello(instance=index.to_bytes(16, "big"), timeout_ms=60_000))
        for wire in wires:
            wire.expect(m.Welcome)
            wire.send(m.Ready("tcp"))
        for _ in range(3):
            with takes_at_most(SOON_S):
                assert pulls(node)
        assert relinks(node, port)
    assert eventually(lambda: owner.call(descriptors) < before + 10)


def test_an_owner_out_of_descriptors_recovers(node: Node, victim: NodeProcess) -> None:
    settings: dict[str, Any] = {"transfer_path": "tcp", "sync_kv_timeout": 5000}
    port = victim.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    victim.call(publish)
    node.start(LLMRole.DECODER, 2, **settings)
    assert node.link(port, 1) == SUCCESS
    assert pulls(node)
    victim.call(limit_descriptors, 30)
    with ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(Wire.dial(port))
        mine = node.blocks_cache(*SHAPE)  # one block needs no further stream
        node.manager.pull_blocks(BlocksCacheKey(1, 0), mine, [3], [5])
        got = node.arrays[mine.cache_id][:, 5]
        assert np.array_equal(got, what_is_owned()[:, 3]), "the open streams serve on"
    assert relinks(node, port)


def limit_descriptors(node: Node, more: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors(node) + more, hard))


# -- peers that were linked by hand ----------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["two-sided", "remote-accessible"])
def evil(request: pytest.FixtureRequest, owner: NodeProcess) -> Iterator[LinkedCaller]:
    """A linked peer that may send what it likes."""
    port = owner.call(
        Node.start,
        LLMRole.PROMPT,
        1,
        listen_ip_info="127.0.0.1:0",
        enable_remote_cache_accessible=request.param,
    )
    with linked_caller(port, is_remote_accessible=request.param) as evil:
        yield evil


def own(node: Node) -> tuple[int, list[int]]:
    """Registers memory with a margin of secrets around each tensor; cache id, addresses."""
    desc = CacheDesc(2, [4, 64], DataType.DT_INT8)
    array = make_array((2, 3, 256), 4)
    tensors = addrs_of(array)
    addrs = [addr + 256 for addr in tensors]
    cache = node.manager.register_blocks_cache(desc, addrs, BlocksCacheKey(0, 0))
    node.arrays[cache.cache_id] = array
    return cache.cache_id, addrs


def ask(wire: Wire, cache: m.CacheInfo, pairs: list[tuple[int, int]]) -> m.AnyMessage:
    wire.send(m.Read(cache.cache_id, cache.generation, 1000, columns(pairs)))
    return wire.receive()


def test_a_read_within_the_cache_is_answered(evil: LinkedCaller, owner: NodeProcess) -> None:
    cache_id, addrs = owner.call(own)
    stream = evil.attach()
    stream.send(m.Resolve(cache_id, 0, 0, False))
    info = stream.expect(m.Resolved).info
    assert np.frombuffer(info.addrs, dtype="<u8").tolist() == addrs
    assert ask(stream, info, [(addrs[1] + 64, 64), (addrs[0], 256)]) == m.Sending(320)
    secret = make_array((2, 3, 256), 4)
    assert stream.receive_bytes(320) == secret[1, 1, 64:128].tobytes() + secret[0, 1].tobytes()
    assert stream.receive_bytes(16) == info.generation.to_bytes(8, "little") + bytes(8)


@pytest.mark.parametrize(
    "reach",
    [
        pytest.param(lambda addr: [(addr - 1, 1)], id="before"),
        pytest.param(lambda addr: [(addr - 1, 257)], id="from-before"),
        pytest.param(lambda addr: [(addr + 256, 1)], id="behind"),
        pytest.param(lambda addr: [(addr + 1, 256)], id="over-the-end"),
        pytest.param(lambda addr: [(addr, 64), (addr + 255, 2)], id="second-segment"),
        pytest.param(lambda addr: [(addr, 2**64 - 1)], id="all-there-is"),
        pytest.param(lambda addr: [(addr + 8, 2**64 - 8)], id="wraps-around"),
        pytest.param(lambda addr: [(addr, 2**64 - addr + 16)], id="wraps-to-low-memory"),
        pytest.param(lambda addr: [(2**64 - 1, 1)], id="last-byte"),
        pytest.param(lambda addr: [(0, 8)], id="null"),
        pytest.param(lambda addr: [(addr, 2**63), (addr, 2**63)], id="sum-wraps"),
    ],
)
def test_a_read_beyond_the_cache_is_refused(
    evil: LinkedCaller,
    owner: NodeProcess,
    reach: Callable[[int], list[tuple[int, int]]],
) -> None:
    cache_id, addrs = owner.call(own)
    stream = evil.attach()
    stream.send(m.Resolve(cache_id, 0, 0, False))
    info = stream.expect(m.Resolved).info
    for addr in addrs:
        refused = ask(stream, info, reach(addr))
        assert isinstance(refused, m.Refused)
        assert refused.status == PARAM_INVALID
        assert "beyond the tensors" in refused.message
    assert ask(stream, info, [(addrs[0], 1)]) == m.Sending(1), "the stream is in order"


def test_a_read_that_multiplies_itself_is_refused(evil: LinkedCaller, owner: NodeProcess) -> None:
    """Many segments may name the same bytes: the sum has a cap."""
    shape = (1, 1, 1 << 28)
    cache_id = owner.call(add_cache, shape)
    stream = evil.attach()
    stream.send(m.Resolve(cache_id, 0, 0, False))
    info = stream.expect(m.Resolved).info
    addr = int(np.frombuffer(info.addrs, dtype="<u8")[0])
    before = owner.call(resident_nbytes)
    refused = ask(stream, info, [(addr, 1 << 28)] * 60_000)
    assert isinstance(refused, m.Refused)
    assert refused.status == PARAM_INVALID
    assert owner.call(resident_nbytes) - before < 50_000_000


def add_cache(node: Node, shape: tuple[int, int, int]) -> int:
    return node.blocks_cache(*shape).cache_id


def test_a_read_of_what_is_not_offered_is_refused(evil: LinkedCaller, owner: NodeProcess) -> None:
    cache_id, addrs = owner.call(own)
    stream = evil.attach()
    stream.send(m.Resolve(cache_id, 0, 0, False))
    info = stream.expect(m.Resolved).info
    for wrong_id, generation in (
        (cache_id, info.generation + 1),
        (cache_id, 0),
        (cache_id + 1, info.generation),
        (-1, info.generation),
        (2**63, info.generation),
    ):
        stream.send(m.Read(wrong_id, generation, 1000, columns([(addrs[0], 8)])))
        assert stream.expect(m.Refused).status == NOT_EXIST
    # the probe's memory is readable, and nothing else by its id
    probe = evil.welcome.probe
    stream.send(m.Read(0, probe.generation, 1000, columns([(addrs[0], 8)])))
    assert stream.expect(m.Refused).status == PARAM_INVALID


def test_memory_that_is_not_accessible_is_not_told_of_and_not_sent(
    evil: LinkedCaller, owner: NodeProcess
) -> None:
    cache_id, addr = owner.call(own_privately)
    public_id, _ = owner.call(own)
    stream = evil.attach()
    stream.send(m.ListCaches())
    assert [info.cache_id for info in stream.expect(m.Caches).infos] == [public_id]
    stream.send(m.Resolve(cache_id, 0, 0, False))
    assert stream.expect(m.Refused).status == PARAM_INVALID
    near = evil.welcome.probe.generation  # one of the next is the cache's
    answers = set()
    for generation in range(near, near + 16):
        stream.send(m.Read(cache_id, generation, 1000, columns([(addr, 8)])))
        answers.add(stream.expect(m.Refused).status)
    assert answers == {NOT_EXIST, PARAM_INVALID}


def own_privately(node: Node) -> tuple[int, int]:
    cache = node.blocks_cache(remote_accessible=False)
    return cache.cache_id, addrs_of(node.arrays[cache.cache_id])[0]


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(m.encode(m.Read(1, 1, 1000, b"odd")), id="odd-columns"),
        pytest.param(m.encode(m.Read(1, 1, 1000, bytes(16 * 65537))), id="too-many-segments"),
        pytest.param(m.encode(hello()), id="hello"),
        pytest.param(m.encode(m.Sending(8)), id="an-answer"),
        pytest.param(m.HEADER.pack(m.MAGIC, 2**32 - 1), id="huge-length"),
        pytest.param(BAD_TEXT, id="bad-text"),
        pytest.param(b"\0" * 64, id="zeros"),
    ],
)
def test_nonsense_on_a_stream_ends_it_and_no_other(
    evil: LinkedCaller, owner: NodeProcess, said: bytes
) -> None:
    cache_id, _ = owner.call(own)
    good, bad = evil.attach(), evil.attach()
    bad.send_bytes(said)
    with takes_at_most(SOON_S):
        assert bad.is_ended()
    good.send(m.Resolve(cache_id, 0, 0, False))
    assert good.expect(m.Resolved).info.cache_id == cache_id


def test_a_stream_that_asks_and_does_not_read_holds_up_nobody(
    node: Node, owner: NodeProcess, port: int
) -> None:
    """More such streams than an engine has threads to answer with, each asking for very long."""
    key = m.Resolve(None, 2**64 - 1, 0, False)
    with linked_caller(port) as evil:
        for _ in range(20):
            stream = evil.attach()
            stream.send(key)
            info = stream.expect(m.Resolved).info
            addr = int(np.frombuffer(info.addrs, dtype="<u8")[0])
            pairs = [(addr, SHAPE[1] * SHAPE[2])] * 100
            stream.send(m.Read(info.cache_id, info.generation, 600_000, columns(pairs)))
            stream.expect(m.Sending)
        for _ in range(3):
            with takes_at_most(SOON_S):
                assert pulls(node)
        assert relinks(node, port)


def test_a_peer_uses_up_nothing_that_it_may_not_reach(node: Node) -> None:
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", transfer_path="tcp")
    array = make_array((1, 4, 64), 1)
    private = node.manager.register_blocks_cache(
        CacheDesc(1, [4, 64], DataType.DT_INT8), addrs_of(array), None, False, readers=1
    )
    with linked_caller(port) as linked:
        stream = linked.attach()
        stream.send(m.UseUp(private.cache_id, 0, 0, 0))
        assert stream.expect(m.Refused).status == PARAM_INVALID
        assert not node.manager.wait_for_readers(private, 0)
