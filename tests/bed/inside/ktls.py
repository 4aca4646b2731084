"""Links under TLS that the kernel seals: what is moved, what is refused, and who is in between."""

from __future__ import annotations

import ctypes
import json
import mmap
import subprocess
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typer.testing import CliRunner

from bed.inside.between import HEAD_NBYTES, Between
from llm_datadist import BlocksCacheKey, CacheDesc, DataType, LLMException, LLMStatusCode
from llm_datadist.cli import app
from llm_datadist.core import messages as m
from llm_datadist.options import SECURITY_VARIABLE
from llm_datadist.testing.cluster import Node, NodeProcess, addrs_of, make_array
from llm_datadist.testing.contract import TransportContract
from llm_datadist.testing.contract_steps import Pair, linked
from llm_datadist.testing.timing import takes_at_most
from llm_datadist.types import LLMRole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llm_datadist.links.table import LinkInfo

SUCCESS, INVALID = LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_PARAM_INVALID
LOST = (
    LLMStatusCode.LLM_NOT_YET_LINK, LLMStatusCode.LLM_FAILED, LLMStatusCode.LLM_TIMEOUT,
)  # fmt: skip
KEY = BlocksCacheKey(1, 0)
SHAPE = (2, 16, 32 * 1024)
SRC, DST = [1, 3, 5, 7, 9, 11], [6, 5, 4, 3, 2, 1]
FILL = 0xEE
LINK_TIMEOUT_MS, SYNC_TIMEOUT_MS = 50_000, 10_000
#: over the time-out, on a machine that is emulated
BUDGET_S = 1.2 * SYNC_TIMEOUT_MS / 1000 + 2.0
#: in a record of a cache's bytes
MANY_NBYTES = 1000
CLONE_NEWNET = 0x40000000
#: every frame begins with it
MAGIC = m.HEADER.pack(m.MAGIC, 0)[:4]


@pytest.fixture(scope="module")
def settings(security: str) -> dict[str, Any]:
    return {
        "transfer_path": "tcp", "link_security": security, "sync_kv_timeout": SYNC_TIMEOUT_MS,
    }  # fmt: skip


@pytest.fixture(scope="module")
def peer() -> Iterator[NodeProcess]:
    with NodeProcess() as process:
        yield process


@pytest.fixture
def node(peer: NodeProcess) -> Iterator[Node]:
    here = Node()
    yield here
    here.stop()
    peer.call(Node.stop)


def own(node: Node, seed: int) -> int:
    return node.blocks_cache(*SHAPE, seed=seed, key=KEY).cache_id


def start_owner(peer: NodeProcess, **settings: Any) -> int:
    settings = {"listen_ip_info": "127.0.0.1:0", **settings}
    port = peer.call(Node.start, LLMRole.MIX, 1, **settings)
    peer.call(own, 1)
    return port


def pull(node: Node, src: list[int] = SRC, dst: list[int] = DST) -> None:
    """Checks whatever comes of it: no wrong byte, and none elsewhere."""
    cache = node.blocks_cache(*SHAPE)
    array = node.arrays.pop(cache.cache_id)
    array[:] = FILL
    expected = np.full(SHAPE, FILL, np.uint8)
    expected[:, dst] = make_array(SHAPE, 1)[:, src]
    try:
        node.manager.pull_blocks(KEY, cache, src, dst)
    except LLMException:
        assert np.all((array == expected) | (array == FILL))
        raise
    finally:
        node.manager.unregister_cache(cache.cache_id)
    np.testing.assert_array_equal(array, expected)


def links(node: Node) -> list[LinkInfo]:
    return node.datadist.links()


def encryptions(node: Node, peer: NodeProcess) -> list[str]:
    return [link.encryption for link in (*links(node), *peer.call(links))]


def sealed_by_the_kernel() -> tuple[int, int]:
    """Connections so far that it sends on, and receives on."""
    lines = dict(line.split() for line in Path("/proc/net/tls_stat").read_text().splitlines())
    return int(lines["TlsTxSw"]), int(lines["TlsRxSw"])


# -- what is moved ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_accessible", [True, False], ids=["remote-accessible", "two-sided"])
def test_a_link_pulls_and_pushes(
    node: Node, peer: NodeProcess, settings: dict[str, Any], is_accessible: bool
) -> None:
    before = sealed_by_the_kernel()
    settings = {**settings, "enable_remote_cache_accessible": is_accessible}
    with Between(start_owner(peer, **settings)) as between:
        node.start(LLMRole.MIX, 2, **settings)
        assert node.link(between.port, 1, LINK_TIMEOUT_MS) == SUCCESS
        assert encryptions(node, peer) == ["ktls", "ktls"]
        for _ in range(3):
            pull(node)
        if is_accessible:
            push(node, peer)
        assert node.unlink(between.port, 1, LINK_TIMEOUT_MS) == SUCCESS
        assert len(between.seen) > 3 * SHAPE[0] * len(SRC) * SHAPE[2]
        for seed, block in product((1, 3), SRC):
            assert make_array(SHAPE, seed)[0, block, 500:516].tobytes() not in between.seen
        assert MAGIC not in between.seen
    counts = zip(sealed_by_the_kernel(), before, strict=True)
    sending, receiving = (now - then for now, then in counts)
    assert sending == receiving >= 4, "both ends of a control connection, and of a stream"


def push(node: Node, peer: NodeProcess) -> None:
    cache = node.blocks_cache(*SHAPE, seed=3)
    landing = peer.call(Node.add_blocks, *SHAPE, key=BlocksCacheKey(1, 7))
    node.manager.push_blocks(BlocksCacheKey(1, 7), cache, SRC, DST)
    expected = np.zeros(SHAPE, np.uint8)
    expected[:, DST] = make_array(SHAPE, 3)[:, SRC]
    np.testing.assert_array_equal(peer.call(Node.array_of, landing), expected)


def test_on_one_host_the_kernel_does_not_seal_and_links_are_made(
    node: Node, peer: NodeProcess, security: str
) -> None:
    """The kernel seals TCP alone, and the path by memory has its own connections."""
    port = start_owner(peer, link_security=security)
    node.start(LLMRole.MIX, 2, link_security=security)
    assert node.link(port, 1, LINK_TIMEOUT_MS) == SUCCESS
    [link] = links(node)
    assert (link.path, link.encryption) == ("cma", "tls-records"), link
    pull(node)


def leave_the_network(_: Node) -> None:
    """To where not even loopback is: nothing within the host can be tried."""
    assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) == 0


def run(_: Node, command: str) -> None:
    subprocess.run(command.split(), check=True)


@contextmanager
def end_that_cannot() -> Iterator[NodeProcess]:
    """In a network without loopback, and one wire to it."""
    with NodeProcess() as process:
        process.call(leave_the_network)
        near = f"ip link add near type veth peer name far netns {process.pid}"
        for command in (near, "ip addr add 192.0.2.1/24 dev near", "ip link set near up"):
            subprocess.run(command.split(), check=True)
        for command in ("ip addr add 192.0.2.2/24 dev far", "ip link set far up"):
            process.call(run, command)
        yield process


@pytest.mark.parametrize("who", ["caller", "listener"])
def test_with_an_end_that_cannot_there_are_records(
    node: Node, settings: dict[str, Any], who: str
) -> None:
    with end_that_cannot() as far:
        host = "192.0.2.1" if who == "caller" else "192.0.2.2"
        listening = {**settings, "listen_ip_info": f"{host}:0"}
        if who == "caller":
            port = node.start(LLMRole.MIX, 1, **listening)
            own(node, 1)
            far.call(Node.start, LLMRole.MIX, 2, **settings)
            assert far.call(Node.link, port, 1, LINK_TIMEOUT_MS, host=host) == SUCCESS
            far.call(pull)
        else:
            port = start_owner(far, **listening)
            node.start(LLMRole.MIX, 2, **settings)
            assert node.link(port, 1, LINK_TIMEOUT_MS, host=host) == SUCCESS
            pull(node)
        assert encryptions(node, far) == ["tls-records", "tls-records"]


def test_what_doctor_says(security: str) -> None:
    said = CliRunner().invoke(
        app, ["doctor", "--no-measure", "--json"], env={SECURITY_VARIABLE: security}
    )
    findings = {each["name"]: each for each in json.loads(said.stdout)["findings"]}
    assert findings["link security"]["data"]["encryption"] == "ktls"
    assert "sealed by the kernel" in findings["link security"]["found"]


# -- memory that is not there ----------------------------------------------------------------------


def own_hole(node: Node) -> int:
    """Four blocks of which the last two are mapped no more."""
    size = 4 << 20
    hole = mmap.mmap(-1, size)
    addr = np.frombuffer(hole, np.uint8).ctypes.data
    desc = CacheDesc(1, [4, size // 4], DataType.DT_INT8)
    key = BlocksCacheKey(node.datadist.cluster_id, 9)
    cache = node.manager.register_blocks_cache(desc, [addr], key)
    libc = ctypes.CDLL(None)
    assert libc.munmap(ctypes.c_void_p(addr + size // 2), ctypes.c_size_t(size // 2)) == 0
    node.caches[cache.cache_id] = cache
    _kept.append(hole)  # to close it would unmap it again
    return cache.cache_id


_kept: list[mmap.mmap] = []


def test_memory_that_is_not_mapped_is_an_error_and_the_link_goes_on(
    node: Node, peer: NodeProcess, settings: dict[str, Any]
) -> None:
    port = start_owner(peer, **settings)
    peer.call(own_hole)
    node.start(LLMRole.MIX, 2, **settings)
    assert node.link(port, 1, LINK_TIMEOUT_MS) == SUCCESS
    array = make_array((1, 4, 1 << 20), None)
    desc = CacheDesc(1, [4, 1 << 20], DataType.DT_INT8)
    cache = node.manager.register_blocks_cache(desc, addrs_of(array))
    for _ in range(2):
        node.manager.pull_blocks(BlocksCacheKey(1, 9), cache, [0, 1], [0, 1])
        with pytest.raises(LLMException, match=r"remote address .* is not mapped") as error:
            node.manager.pull_blocks(BlocksCacheKey(1, 9), cache, [1, 3], [0, 2])
        assert error.value.status_code == INVALID
    hole = node.caches[own_hole(node)]
    with pytest.raises(LLMException, match=r"local address .* is not mapped") as error:
        node.manager.pull_blocks(BlocksCacheKey(1, 9), hole, [0, 1], [1, 2])
    assert error.value.status_code == INVALID
    pull(node)


# -- somebody in between ---------------------------------------------------------------------------


def flip(at: int) -> Callable[[bytes, bytes], bytes]:
    def alter(record: bytes, _: bytes) -> bytes:
        altered = bytearray(record)
        altered[at] ^= 1
        return bytes(altered)

    return alter


ALTERATIONS: dict[str, Callable[[bytes, bytes], bytes]] = {
    "version": flip(1),
    "length": flip(4),
    "first byte": flip(HEAD_NBYTES),
    "last byte": flip(-17),
    "kind of what is sealed": flip(-18),
    "tag": flip(-1),
    "dropped": lambda _, __: b"",
    "repeated": lambda record, _: 2 * record,
    "an earlier one": lambda _, former: former,
    "an alert in the clear": lambda record, _: b"\x15\x03\x03\x00\x02\x01\x00" + record,
    "added": lambda record, _: b"\x17\x03\x03" + (40).to_bytes(2, "big") + bytes(40) + record,
    "of no length": lambda record, _: b"\x17\x03\x03\x00\x00" + record,
    "too long": lambda record, _: b"\x17\x03\x03\xff\xff" + record,
    "plain": lambda record, _: MAGIC + record,
}


@pytest.mark.parametrize("how", ALTERATIONS)
@pytest.mark.parametrize("number", [0, 7])
def test_who_alters_records_has_no_byte_arrive(
    node: Node, peer: NodeProcess, settings: dict[str, Any], how: str, number: int
) -> None:
    """The answer's frame, or bytes of the cache in the middle of it."""
    settings = {**settings, "sync_kv_timeout": 3000}
    with Between(start_owner(peer, **settings)) as between:
        node.start(LLMRole.MIX, 2, **settings)
        assert node.link(between.port, 1, LINK_TIMEOUT_MS) == SUCCESS
        pull(node)
        passed: list[bytes] = []

        def alter(record: bytes) -> bytes:
            passed.append(record)
            is_it = len(passed) == number + 1
            former = passed[-2] if len(passed) > 1 else record[:-1] + bytes(1)
            return ALTERATIONS[how](record, former) if is_it else record

        between.alter = alter
        with takes_at_most(BUDGET_S), pytest.raises(LLMException) as error:
            pull(node)
        assert len(passed) > number
        assert error.value.status_code in LOST
        between.alter = bytes
        pull(node)
        pull(node)
        assert encryptions(node, peer) == ["ktls", "ktls"], "the link was not harmed"


def test_a_network_that_has_records_come_in_parts(
    node: Node, peer: NodeProcess, settings: dict[str, Any]
) -> None:
    """Those of a large request, too, which the owner's loop receives."""
    shape = 2, 3000, 24
    with Between(start_owner(peer, **settings)) as between:
        between.piece_nbytes = 1000
        peer.call(Node.add_blocks, *shape, seed=5, key=BlocksCacheKey(1, 5))
        node.start(LLMRole.MIX, 2, **settings)
        assert node.link(between.port, 1, LINK_TIMEOUT_MS) == SUCCESS
        cache = node.blocks_cache(*shape)
        src = list(range(0, 3000, 2))
        node.manager.pull_blocks(BlocksCacheKey(1, 5), cache, src, src[::-1])
        expected = np.zeros(shape, np.uint8)
        expected[:, src[::-1]] = make_array(shape, 5)[:, src]
        np.testing.assert_array_equal(node.arrays[cache.cache_id], expected)
        pull(node)


def test_the_word_for_it(node: Node, peer: NodeProcess, settings: dict[str, Any]) -> None:
    with Between(start_owner(peer, **settings)) as between:
        node.start(LLMRole.MIX, 2, **settings)
        assert node.link(between.port, 1, LINK_TIMEOUT_MS) == SUCCESS
        pull(node)
        between.alter = lambda record: flip(-1)(record, b"")
        with pytest.raises(LLMException, match="somebody is in between"):
            pull(node)


def test_an_owner_that_is_killed_within_a_record_is_gone(
    node: Node, settings: dict[str, Any]
) -> None:
    with NodeProcess() as victim, Between(start_owner(victim, **settings)) as between:
        node.start(LLMRole.MIX, 2, **settings)
        assert node.link(between.port, 1, LINK_TIMEOUT_MS) == SUCCESS
        pull(node)

        def cut(record: bytes) -> bytes:
            if len(record) > MANY_NBYTES:
                victim.kill()
                return record[: MANY_NBYTES // 2]
            return record

        between.alter = cut
        with takes_at_most(BUDGET_S), pytest.raises(LLMException) as error:
            pull(node)
        assert error.value.status_code in LOST


class TestContract(TransportContract):
    """The contract whole, under TLS."""

    path = "tcp"
    sync_timeout_ms = 20_000
    most_idle_cpu = 1.0  # how fast anything is says nothing here

    @pytest.fixture(autouse=True)
    def _secured(self, security: str) -> None:
        self._security = security

    def _linked(self, owner: NodeProcess, reader: NodeProcess, *, is_accessible: bool) -> Pair:
        pair = linked(
            owner,
            reader,
            transfer_path=self.path,
            enable_remote_cache_accessible=is_accessible,
            sync_kv_timeout=self.sync_timeout_ms,
            link_security=self._security,
        )
        assert [each.encryption for each in reader.call(links)] == ["ktls"]
        return pair
