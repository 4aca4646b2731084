"""One linked peer that asks for all it can: others have their share, and it ends when it is cut."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from wire import NONCE, PROBE, LinkedCaller, Wire, columns, impostor, linked_caller

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    DataType,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.core import messages as m
from llm_datadist.core.registry import KeyName
from llm_datadist.core.remote_keys import pack_keys
from llm_datadist.testing.cluster import Node, NodeProcess, cluster_info, make_array
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist import Cache

SUCCESS = LLMStatusCode.LLM_SUCCESS
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK
SHAPE = (2, 8, 1 << 19)
#: the id of peers made by hand, and so many streams one has
GREEDY, STREAMS = 4242, 32
SOON_S = 2.0
TIMEOUT_MS = 20_000
SETTINGS: dict[str, Any] = {
    "transfer_path": "tcp",
    "sync_kv_timeout": TIMEOUT_MS,
    "enable_remote_cache_accessible": True,
}


def own(node: Node) -> None:
    node.blocks_cache(*SHAPE, seed=1, key=BlocksCacheKey(0, 0))


def pulls(node: Node) -> bool:
    cache, blocks = node.blocks_cache(*SHAPE), list(range(SHAPE[1]))
    node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, blocks, blocks)
    is_right = np.array_equal(node.arrays[cache.cache_id], make_array(SHAPE, 1))
    node.manager.unregister_cache(cache.cache_id)
    return is_right


@pytest.fixture
def port(node: Node, victim: NodeProcess) -> int:
    """An owner in another process, to which a node here is linked."""
    port = victim.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **SETTINGS)
    victim.call(own)
    node.start(LLMRole.DECODER, 7, **SETTINGS)
    assert node.link(port, 1) == SUCCESS
    assert pulls(node)
    return port


@pytest.fixture
def greedy(port: int) -> Iterator[LinkedCaller]:
    with linked_caller(port, is_remote_accessible=True) as greedy:
        yield greedy


def the_cache(greedy: LinkedCaller) -> tuple[m.CacheInfo, int]:
    """Of the owner, and its first address."""
    stream = greedy.attach()
    stream.send(m.Resolve(None, 2**64 - 1, 0, False))
    info = stream.expect(m.Resolved).info
    stream.socket.close()
    return info, int(np.frombuffer(info.addrs, dtype="<u8")[0])


def cut(node: Node) -> None:
    node.datadist.unlink_clusters([cluster_info(1, GREEDY)], 1000, True)


def forget(node: Node) -> float:
    """How long it took to unregister the cache."""
    begun = time.monotonic()
    node.manager.unregister_cache(1)
    return time.monotonic() - begun


@pytest.mark.parametrize("ends_by", [cut, forget], ids=lambda end: end.__name__)
def test_checksums_without_end_keep_nobody_waiting_and_end(
    node: Node, victim: NodeProcess, greedy: LinkedCaller, ends_by: Any
) -> None:
    info, addr = the_cache(greedy)
    streams = [greedy.attach() for _ in range(STREAMS)]
    ask_for_checksums(streams, info, addr)
    for _ in range(3):
        with takes_at_most(SOON_S):
            assert pulls(node)
    with takes_at_most(SOON_S):
        victim.call(ends_by)
    for stream in streams:
        if ends_by is cut:
            assert stream.is_ended()
    if ends_by is cut:
        assert victim.call(forget) < SOON_S
    elif ends_by is forget:
        for stream in streams:
            assert stream.expect(m.Refused).status == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


def ask_for_checksums(streams: list[Wire], info: m.CacheInfo, addr: int) -> None:
    """Of 256 GiB each, to be made within years."""
    asked = columns([(addr, SHAPE[1] * SHAPE[2])] * 65_536)
    for stream in streams:
        stream.send(m.Digest(info.cache_id, info.generation, 2**40, asked))


def test_finalize_ends_in_its_time_whatever_a_peer_has_asked_for(victim: NodeProcess) -> None:
    settings = {**SETTINGS, "sync_kv_timeout": 1000}
    port = victim.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    victim.call(own)
    with linked_caller(port, is_remote_accessible=True) as greedy:
        info, addr = the_cache(greedy)
        streams = [greedy.attach() for _ in range(STREAMS)]
        ask_for_checksums(streams, info, addr)
        with takes_at_most(1.0 + 2.0 + 1.0):
            victim.call(Node.stop)


def test_answers_without_end_that_are_taken_keep_nobody_waiting(
    node: Node, greedy: LinkedCaller
) -> None:
    info, addr = the_cache(greedy)
    asked = columns([(addr, SHAPE[1] * SHAPE[2])] * 60_000)
    with ExitStack() as stack:
        streams = [greedy.attach() for _ in range(STREAMS)]
        for stream in streams:
            stream.send(m.Read(info.cache_id, info.generation, 600_000, asked))
        for stream in streams:
            drain(stack, stream)
        for _ in range(3):
            with takes_at_most(SOON_S):
                assert pulls(node)


def drain(stack: ExitStack, stream: Wire) -> None:
    """Takes what comes, in a thread, until the test ends."""

    def take() -> None:
        buffer = bytearray(1 << 20)
        try:
            while stream.socket.recv_into(buffer):
                pass
        except OSError:
            return

    thread = threading.Thread(target=take)
    thread.start()
    stack.callback(thread.join)
    stack.callback(hang_up, stream)


def test_pushes_that_stall_keep_no_thread_from_others(
    node: Node, victim: NodeProcess, greedy: LinkedCaller
) -> None:
    """The owner reads them over streams on which nothing is answered."""
    info, addr = the_cache(greedy)
    blocks = np.array([0x1000, addr, 4096], dtype="<u8").tobytes()
    for _ in range(STREAMS):
        greedy.attach().send(
            m.Fetch(info.cache_id, info.generation, 1, 1, 8, 600_000, 1e11, blocks)
        )
    mine = node.blocks_cache(*SHAPE, seed=9)
    for _ in range(3):
        with takes_at_most(SOON_S):
            node.manager.push_blocks(BlocksCacheKey(1, 0), mine, [3], [5])
            node.manager.pull_blocks(BlocksCacheKey(1, 0), mine, [1], [2])
    victim.call(cut)
    assert victim.call(forget) < SOON_S


def test_pushes_to_where_they_must_not_reach_keep_no_others_waiting(
    node: Node, victim: NodeProcess, greedy: LinkedCaller
) -> None:
    """More than there are threads for one link: what waits for its turn is looked at before."""
    info, addr = the_cache(greedy)
    stalls = np.array([0x1000, addr, 4096], dtype="<u8").tobytes()
    everywhere = np.array([0x1000, 0, 2**64 - 1], dtype="<u8").tobytes()
    streams = [greedy.attach() for _ in range(STREAMS)]
    for index, stream in enumerate(streams):
        block = stalls if index < STREAMS // 2 else everywhere
        stream.send(m.Fetch(info.cache_id, info.generation, 1, 1, 8, 600_000, 1e11, block))
    for stream in streams[STREAMS // 2 :]:
        assert stream.expect(m.Refused).status == LLMStatusCode.LLM_PARAM_INVALID
    mine = node.blocks_cache(*SHAPE, seed=9)
    with takes_at_most(SOON_S):
        node.manager.push_blocks(BlocksCacheKey(1, 0), mine, [3], [5])


def test_a_push_of_more_than_the_cache_holds_is_refused(greedy: LinkedCaller) -> None:
    info, addr = the_cache(greedy)
    nbytes = SHAPE[1] * SHAPE[2]
    many = np.array([[0x1000] * 65_535, [addr] * 65_535, [nbytes] * 65_535], dtype="<u8")
    stream = greedy.attach()
    stream.send(m.Fetch(info.cache_id, info.generation, 1, 1, 8, 600_000, 1e11, many.tobytes()))
    with takes_at_most(SOON_S):
        refused = stream.expect(m.Refused)
    assert refused.status == LLMStatusCode.LLM_PARAM_INVALID


def resident_nbytes(_: Node) -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_frames_that_never_end_hold_little_memory(
    node: Node, victim: NodeProcess, greedy: LinkedCaller
) -> None:
    before = victim.call(resident_nbytes)
    header = m.HEADER.pack(m.MAGIC, m.MAX_BODY_NBYTES)
    too_large = greedy.attach()
    too_large.send_bytes(header)
    assert too_large.is_ended()
    most = m.HEADER.pack(m.MAGIC, m.MAX_REQUEST_BODY_NBYTES)
    for _ in range(STREAMS - 1):
        greedy.attach().send_bytes(most + bytes(m.MAX_REQUEST_BODY_NBYTES - 1))
    assert pulls(node)
    assert victim.call(resident_nbytes) - before < 120_000_000
    greedy.control.send_bytes(header)
    assert greedy.control.is_ended()


def test_tables_that_are_not_taken_hold_little_memory(
    node: Node, victim: NodeProcess, greedy: LinkedCaller
) -> None:
    victim.call(own_many)
    before = victim.call(resident_nbytes)
    streams = [greedy.attach() for _ in range(STREAMS)]
    for stream in streams:
        stream.send(m.ListCaches())
    with takes_at_most(SOON_S):
        assert pulls(node)
    assert eventually(lambda: sum(has_come(stream) for stream in streams) == STREAMS, 10.0)
    assert victim.call(resident_nbytes) - before < 120_000_000
    answers = [type(stream.receive()) for stream in streams]
    assert answers.count(m.Caches) >= 4
    # how many depends on how soon the network has taken the others
    assert answers.count(m.Refused) >= STREAMS // 4


def own_many(node: Node) -> None:
    """A table of some 3 MiB."""
    desc = CacheDesc(128, [4, 64], DataType.DT_INT8)
    array = make_array((1, 1, 256), 4)
    node.arrays[-1] = array
    for _ in range(3000):
        node.manager.register_blocks_cache(desc, [int(array.ctypes.data)] * 128)


def has_come(stream: Wire) -> bool:
    return bool(select.select([stream.socket], [], [], 0)[0])


def test_requests_one_behind_the_other_leave_others_their_turn(
    node: Node, victim: NodeProcess, greedy: LinkedCaller
) -> None:
    with ExitStack() as stack:
        for _ in range(8):
            stream = greedy.attach()
            drain(stack, stream)
            send_on(stack, stream, m.encode(m.Resolve(None, 2**64 - 1, 0, False)) * 4000)
        for _ in range(5):
            with takes_at_most(SOON_S):
                assert pulls(node)


ROW_NBYTES = 20 << 20
#: room for one such cache of two rows
SMALL_POOL = json.dumps({"memory_size": 64 << 20})


def start_small(node: Node, timeout_ms: int) -> int:
    settings = {**SETTINGS, "sync_kv_timeout": timeout_ms, "mem_pool_cfg": SMALL_POOL}
    port = node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    fill(node, 1)
    return port


def fill(node: Node, value: int) -> None:
    """Allocates all that the pool has, for a key, and fills it."""
    desc = CacheDesc(1, [2, ROW_NBYTES], DataType.DT_INT8)
    node.caches[0] = node.manager.allocate_cache(desc, [CacheKey(1, value)])
    ctypes.memset(node.caches[0].tensor_addrs[0], value, 2 * ROW_NBYTES)


def drop_id(node: Node) -> None:
    node.manager.deallocate_cache(node.caches[0])


def drop_key(node: Node) -> None:
    node.manager.remove_cache_key(CacheKey(1, 1))


def ask_for_all(greedy: LinkedCaller) -> tuple[Wire, m.CacheInfo]:
    """A stream on which the cache comes, of which nothing has been taken yet."""
    stream = greedy.attach()
    stream.send(m.Resolve(None, 1, 0, False))
    info = stream.expect(m.Resolved).info
    addr = int(np.frombuffer(info.addrs, dtype="<u8")[0])
    stream.send(m.Read(info.cache_id, info.generation, 600_000, columns([(addr, 2 * ROW_NBYTES)])))
    assert stream.expect(m.Sending).nbytes == 2 * ROW_NBYTES
    return stream, info


def take_all(stream: Wire, pause_s: float = 0.0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What comes, a little at a time, and its trailer."""
    data = np.zeros(2 * ROW_NBYTES + 16, np.uint8)
    left, pause = data.data, threading.Event()
    while len(left):
        taken = stream.socket.recv_into(left[: 1 << 20])
        assert taken
        left = left[taken:]
        pause.wait(pause_s)
    return data


@pytest.mark.parametrize("last", ["its id", "a key", "a key that is used up"])
def test_who_takes_nothing_keeps_no_freed_memory_from_its_pool(
    victim: NodeProcess, last: str
) -> None:
    """Nor does it get a byte of what lies there afterwards."""
    port = victim.call(start_small, TIMEOUT_MS)
    with linked_caller(port, is_remote_accessible=True) as greedy:
        streams = [ask_for_all(greedy)[0] for _ in range(3)]
        stream, info = ask_for_all(greedy)
        victim.call(drop_key if last == "its id" else drop_id)
        if last == "its id":
            victim.call(drop_id)
        elif last == "a key":
            victim.call(drop_key)
        else:
            asking = greedy.attach()
            asking.send(m.UseUp(info.cache_id, 0, 0, 0))
            asking.expect(m.Done)
        with takes_at_most(SOON_S):
            victim.call(fill, 2)
        for each in (stream, *streams):
            data = take_all(each)
            assert data[0] == 1
            assert not data[-16:].any(), "the word that it is stale, and no bad address"
            assert not (data == 2).any()


def start_to_push(node: Node) -> None:
    """Allocates a blocks cache, and pushes it from another thread."""
    desc = CacheDesc(2, [2, ROW_NBYTES // 2], DataType.DT_INT8)
    cache = node.caches[1] = node.manager.allocate_blocks_cache(desc)
    for addr in cache.tensor_addrs:
        ctypes.memset(addr, 7, ROW_NBYTES)
    _pushing.append(ThreadPoolExecutor(1).submit(push, node, cache))


_pushing: list[Future[LLMStatusCode]] = []


def push(node: Node, cache: Cache) -> LLMStatusCode:
    try:
        node.manager.push_blocks(BlocksCacheKey(GREEDY, 0), cache, [0, 1], [0, 1])
    except LLMException as error:
        return error.status_code
    return SUCCESS


def free_what_is_pushed(node: Node) -> None:
    node.manager.deallocate_blocks_cache(node.caches[1])


def outcome_of_push(_: Node) -> LLMStatusCode:
    return _pushing.pop().result(TIMEOUT_MS / 1000)


def test_a_push_of_what_is_freed_meanwhile_ends_well(victim: NodeProcess) -> None:
    """The call holds the memory, and what is sent for it is no other's."""
    port = victim.call(start_small, TIMEOUT_MS)
    victim.call(drop_id)
    victim.call(drop_key)
    theirs = m.CacheInfo(
        cache_id=1, kind=1, num_tensors=2, num_rows=2, row_nbytes=ROW_NBYTES // 2,
        is_remote_accessible=True, is_owned=False, generation=5, word_addr=0x3000,
        addrs=np.array([1 << 30, 1 << 31], "<u8").tobytes(),
        keys=pack_keys({KeyName(2**64 - 1, 0): 0}),
    )  # fmt: skip
    with linked_caller(port, is_remote_accessible=True) as peer:
        victim.call(start_to_push)
        peer.reverse.expect(m.ListCaches)
        peer.reverse.send(m.Caches([theirs]))
        fetch = peer.reverse.expect(m.Fetch)
        src, _, nbytes = np.frombuffer(fetch.columns, dtype="<u8").reshape(3, -1).tolist()
        stream = peer.attach()
        asked = columns(list(zip(src, nbytes, strict=True)))
        stream.send(m.Read(fetch.src_cache_id, fetch.src_generation, 600_000, asked))
        assert stream.expect(m.Sending).nbytes == 2 * ROW_NBYTES
        victim.call(free_what_is_pushed)
        data = take_all(stream)
        assert (data[:-16] == 7).all()
        assert data[-16:].view(np.uint64).tolist() == [fetch.src_generation, 0]
        peer.reverse.send(m.Done())
        assert victim.call(outcome_of_push) == SUCCESS
    with takes_at_most(SOON_S):
        victim.call(fill, 2)


def num_descriptors(_: Node) -> int:
    return len(os.listdir("/proc/self/fd"))


def test_who_takes_nothing_for_as_long_as_calls_last_is_cut_off(victim: NodeProcess) -> None:
    port = victim.call(start_small, 1000)
    with linked_caller(port, is_remote_accessible=True) as greedy:
        before = victim.call(num_descriptors)
        streams = [ask_for_all(greedy)[0] for _ in range(3)]
        assert victim.call(num_descriptors) == before + 3
        assert eventually(lambda: victim.call(num_descriptors) == before, 1.0 + SOON_S)
        for stream in streams:
            assert stream.is_ended()


def test_who_takes_a_little_at_a_time_gets_all_of_it(victim: NodeProcess) -> None:
    """Longer than calls of the owner's may last: by the reader's time-out, as long as it takes."""
    port = victim.call(start_small, 1000)
    with linked_caller(port, is_remote_accessible=True) as slow:
        stream, info = ask_for_all(slow)
        begun = time.monotonic()
        data = take_all(stream, pause_s=0.05)
        assert time.monotonic() - begun > 1.5
        assert (data[:-16] == 1).all()
        assert data[-16:].view(np.uint64).tolist() == [info.generation, 0]


MANY_CACHES, MANY_KEYS = 1500, 16_384


def own_much(node: Node) -> None:
    """Many caches of many tensors, and one of as many rows as keys."""
    array = make_array((1, 1, MANY_CACHES * 128 * 64), 4)
    node.arrays[-1] = array
    desc, base = CacheDesc(128, [1, 64], DataType.DT_INT8), int(array.ctypes.data)
    for at in range(MANY_CACHES):
        addrs = [base + (at * 128 + tensor) * 64 for tensor in range(128)]
        node.manager.register_blocks_cache(desc, addrs)
    rows = CacheDesc(1, [MANY_KEYS, 64], DataType.DT_INT8)
    keys = [CacheKey(1, number) for number in range(MANY_KEYS)]
    node.manager.register_cache(rows, [base], keys)


nowhere = np.array([1, 2, 3], dtype="<u8").tobytes()


@pytest.mark.parametrize(
    "question",
    [
        pytest.param(m.Fetch(None, 0, 1, 1, 8, 1000, 1.0, nowhere), id="by address"),
        pytest.param(m.Resolve(None, MANY_KEYS - 1, 0, False), id="by key"),
        pytest.param(m.Resolve(MANY_CACHES + 2, 0, 0, False), id="by id"),
    ],
)
def test_questions_about_much_leave_others_their_turn(
    node: Node, victim: NodeProcess, port: int, greedy: LinkedCaller, question: m.Message
) -> None:
    """Whatever the owner has, an answer in its loop's thread takes about as long."""
    victim.call(own_much)
    with ExitStack() as stack:
        for _ in range(STREAMS):
            stream = greedy.attach()
            drain(stack, stream)
            send_on(stack, stream, m.encode(question) * 100)
        for _ in range(3):
            with takes_at_most(SOON_S):
                assert node.unlink(port, 1) == SUCCESS
                assert node.link(port, 1) == SUCCESS
                assert pulls(node)


def hang_up(stream: Wire) -> None:
    with suppress(OSError):  # the owner was first, or another thread's end of the stream
        stream.socket.shutdown(socket.SHUT_RDWR)


def send_on(stack: ExitStack, stream: Wire, data: bytes) -> None:
    """Says it over and over, in a thread, until the test ends."""

    def send() -> None:
        try:
            while True:
                stream.send_bytes(data)
        except OSError:
            return

    thread = threading.Thread(target=send)
    thread.start()
    stack.callback(thread.join)
    stack.callback(hang_up, stream)


def test_a_storm_of_byes_keeps_nobody_from_unlinking(
    node: Node, victim: NodeProcess, port: int, greedy: LinkedCaller
) -> None:
    """A call runs on that link, so each Bye waits: for all of them one wait is enough."""
    info, addr = the_cache(greedy)
    block = np.array([0x1000, addr, 4096], dtype="<u8").tobytes()
    greedy.attach().send(m.Fetch(info.cache_id, info.generation, 1, 1, 8, 600_000, 1e11, block))
    assert eventually(lambda: victim.call(num_running) > 0)
    before = victim.call(num_threads)
    with ExitStack() as stack:
        send_on(stack, greedy.control, m.encode(m.Bye()) * 4000)
        for _ in range(3):
            with takes_at_most(SOON_S):
                assert node.unlink(port, 1) == SUCCESS
                assert node.link(port, 1) == SUCCESS
                assert pulls(node)
        assert victim.call(num_threads) < before + 20


def num_running(node: Node) -> int:
    return sum(link.num_running for link in node.datadist.stats().links)


def num_threads(_: Node) -> int:
    return threading.active_count()


@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "dropped"])
def test_a_listener_that_wants_streams_without_end_keeps_nobody_waiting(
    node: Node, port: int, caplog: pytest.LogCaptureFixture, keeps: bool
) -> None:
    """At the end that called: it dials for its peer, as many as an honest one uses."""
    is_over = threading.Event()

    def listen(wire: Wire) -> None:
        first = wire.receive()
        if isinstance(first, m.Attach):
            wire.send(m.Attached())
            if first.is_reverse:
                if not keeps:
                    wire.hang_up()
                wire.is_ended()
            else:
                wire.serve_probe()
                wire.is_ended()
            return
        wire.send(m.Welcome(m.PROTOCOL_VERSION, 3, bytes(16), NONCE, {"tcp": b""}, PROBE))
        wire.expect(m.Ready)
        wire.send(m.Linked("tcp"))
        while not is_over.is_set():
            wire.send_bytes(m.encode(m.DialBack(64)) * 1000)

    with impostor(listen) as greedy:
        assert node.link(greedy, 3) == SUCCESS
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with takes_at_most(SOON_S):
                assert pulls(node)
        assert len(os.listdir("/proc/self/fd")) < before + 150  # both ends are here
        is_over.set()
        node.unlink(greedy, 3, force=True)
    assert sum("a stream" in record.message for record in caplog.records) <= 2


# -- cut by force --


@pytest.mark.parametrize("who_cuts", ["puller", "owner"])
def test_a_running_pull_ends_when_the_link_is_cut_at_either_end(
    node: Node, victim: NodeProcess, path: str, who_cuts: str
) -> None:
    settings = {"transfer_path": path, "sync_kv_timeout": 60_000}
    port = victim.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    victim.call(own)
    node.start(LLMRole.DECODER, GREEDY, **settings)
    assert node.link(port, 1) == SUCCESS
    cache = node.blocks_cache(*SHAPE)
    many = [0] * 200_000  # 200 GiB
    outcome: list[tuple[LLMStatusCode, float]] = []

    def pull() -> None:
        try:
            node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, many, many)
        except LLMException as error:
            outcome.append((error.status_code, time.monotonic()))

    pulling = threading.Thread(target=pull)
    pulling.start()
    assert eventually(lambda: bool(node.arrays[cache.cache_id][0, 0].any()), 20.0)
    begun = time.monotonic()
    if who_cuts == "puller":
        node.unlink(port, 1, force=True)
    else:
        victim.call(cut)
    pulling.join(10.0)
    [(status, at)] = outcome
    assert status == NOT_YET_LINK
    assert at - begun < SOON_S
    assert victim.call(forget) < SOON_S
