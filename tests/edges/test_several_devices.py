"""Several devices at the edges: interrupted, finalized, forked, without threads."""

from __future__ import annotations

import os
import random
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
import pytest

import effort
from edges.interrupting import interrupts, is_interrupted
from edges.scarce import become_nobody, lift_limit, limit_threads
from llm_datadist import LLMException
from llm_datadist import cpp as c
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, addrs_of, make_array
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Iterator

Shape: TypeAlias = tuple[int, int, int]
#: large enough to be moved by several threads
SHAPE = (2, 16, 1 << 18)
EVERY = list(range(SHAPE[1]))
LATER = 0x11
#: so often memory is looked at that must not change any more
LOOKS = 20
SOON_S = 2.0
UID = 23481


class Several:
    """An instance with so many devices, one cache of all of them, and its memory."""

    def __init__(self, cluster_id: int, devices: int, path: str, timeout_ms: int = 60_000) -> None:
        self.datadist = c.LlmDataDist(cluster_id, c.LlmRole.kMix)
        self.options = {
            c.OPTION_DEVICE_ID: ";".join(map(str, range(devices))),
            c.OPTION_LISTEN_IP_INFO: ";".join(["127.0.0.1:0"] * devices),
            c.OPTION_SYNC_CACHE_WAIT_TIME: str(timeout_ms),
            "llm_datadist.Path": path,
        }
        assert self.datadist.Initialize(self.options) == c.LLM_SUCCESS
        self.memory: Bytes = make_array((devices, *SHAPE), None)
        self.cache = self._register()

    def _register(self) -> c.Cache:
        desc = c.CacheDesc(
            num_tensors=SHAPE[0], data_type=c.DataType.DT_INT8, shape=list(SHAPE[1:])
        )
        addrs = [addr for device in self.memory for addr in addrs_of(device)]
        status, cache_id = self.datadist.RegisterKvCache(desc, addrs)
        assert status == c.LLM_SUCCESS
        return c.Cache(cache_id, addrs, desc)

    @property
    def ports(self) -> list[int]:
        return [endpoint.port for endpoint in self.datadist.listen_endpoints]

    def link(self, ports: list[int], timeout: int = 5000) -> c.Status:
        infos = c.ClusterInfo(1, 0, [], [c.IpInfo("127.0.0.1", port) for port in ports])
        return self.datadist.LinkLlmClusters([infos], timeout)[0]

    def pull(self) -> c.Status:
        return self.datadist.PullKvBlocks(c.CacheIndex(1, 1), self.cache, EVERY, EVERY)

    def is_left_alone(self) -> bool:
        """The memory is the program's again, and nothing writes there any more."""
        self.memory[:] = LATER
        return all((self.memory == LATER).all() for _ in range(LOOKS))


_there: dict[str, Several] = {}


def start_owner(node: Node, devices: int, path: str, uid: int = 0) -> list[int]:
    if uid:
        become_nobody(uid)
    owner = _there["owner"] = Several(1, devices, path)
    owner.memory[:] = make_array(owner.memory.shape, 1)
    return owner.ports


def stop(node: Node) -> None:
    while _there:
        _there.popitem()[1].datadist.Finalize()


def start_user(node: Node, ports: list[int], path: str, uid: int = 0) -> c.Status:
    if uid:
        become_nobody(uid)
    user = _there["user"] = Several(2, len(ports), path)
    return user.link(ports)


def pulls(node: Node) -> bool:
    """Whether a pull brings what the owner has."""
    user = _there["user"]
    user.memory[:] = 0
    status = user.pull()
    return status == c.LLM_SUCCESS and bool(
        np.array_equal(user.memory, make_array(user.memory.shape, 1))
    )


@pytest.fixture
def owner(peer: NodeProcess) -> Iterator[NodeProcess]:
    yield peer
    peer.call(stop)


# -- interrupted --


def interrupt_in_the_middle(node: Node) -> tuple[str, c.Status]:
    """How a pull ended, and whether its cache can be unregistered at once then."""
    user, how = _there["user"], ""
    with interrupts():
        try:
            user.pull()
        except Exception as error:
            how = type(error).__name__
    with takes_at_most(SOON_S):
        return how, user.datadist.UnregisterKvCache(user.cache.cache_id)


def is_left_alone(node: Node) -> bool:
    return _there["user"].is_left_alone()


def test_a_pull_that_is_interrupted_leaves_the_memory_of_no_device_to_anybody(
    owner: NodeProcess, victim: NodeProcess
) -> None:
    """One device waits for a network that stands still; later it goes on."""
    ports = owner.call(start_owner, 2, "tcp")
    with FaultProxy(ports[1]) as proxy:
        assert victim.call(start_user, [ports[0], proxy.port], "tcp") == c.LLM_SUCCESS
        assert victim.call(pulls)
        before = proxy.nbytes_passed()
        proxy.slow(1 << 20)
        victim.begin(interrupt_in_the_middle)
        while proxy.nbytes_passed() < before + (1 << 16):
            pass
        proxy.stall()
        os.kill(victim.pid, signal.SIGALRM)
        assert victim.result(10) == ("Interrupted", c.LLM_SUCCESS)
        proxy.restore()
        assert victim.call(is_left_alone)


def link_until_interrupted(node: Node, ports: list[int]) -> tuple[str, int]:
    """How a link ended that one device cannot make, and what is left of it."""
    user, how = Several(2, len(ports), "tcp"), ""
    _there["user"] = user
    with interrupts():
        try:
            user.link(ports)
        except Exception as error:
            how = type(error).__name__
    eventually(lambda: not user.datadist.links())
    return how, len(user.datadist.links())


def linked_at(node: Node) -> int:
    return len(_there["owner"].datadist.links())


def test_a_link_that_is_interrupted_is_left_on_no_device(
    owner: NodeProcess, victim: NodeProcess
) -> None:
    ports = owner.call(start_owner, 2, "tcp")
    with FaultProxy(ports[1]) as proxy:
        proxy.stall()
        victim.begin(link_until_interrupted, [ports[0], proxy.port])
        assert eventually(lambda: owner.call(linked_at) == 1)
        os.kill(victim.pid, signal.SIGALRM)
        assert victim.result(10) == ("Interrupted", 0)
        assert eventually(lambda: owner.call(linked_at) == 0)


# -- without threads --


def pulls_without_threads(node: Node) -> bool:
    limit_threads()
    try:
        return pulls(node)
    finally:
        lift_limit()


def test_without_threads_the_devices_take_turns(victim: NodeProcess, path: str) -> None:
    uid = UID + (path == "cma")
    with NodeProcess() as owner:
        ports = owner.call(start_owner, 4, path, uid)
        assert victim.call(start_user, ports, path, uid) == c.LLM_SUCCESS
        assert victim.call(pulls_without_threads)


# -- finalized, forked --


def test_finalizing_waits_for_the_slowest_device(owner: NodeProcess) -> None:
    """And cuts no other's link before: they belong together."""
    ports = owner.call(start_owner, 2, "tcp")
    with FaultProxy(ports[1]) as proxy:
        user = Several(2, 2, "tcp")
        try:
            assert user.link([ports[0], proxy.port]) == c.LLM_SUCCESS
            assert user.pull() == c.LLM_SUCCESS
            user.memory[:] = 0
            before = proxy.nbytes_passed()
            proxy.slow(16 << 20)
            statuses: list[c.Status] = []
            thread = threading.Thread(target=lambda: statuses.append(user.pull()))
            thread.start()
            assert eventually(lambda: proxy.nbytes_passed() > before + (1 << 16))
        finally:
            user.datadist.Finalize()
        thread.join(10)
        assert statuses == [c.LLM_SUCCESS]
        assert np.array_equal(user.memory, make_array(user.memory.shape, 1))


def call_in_a_child(node: Node) -> tuple[c.Status, bool]:
    """The status that the child gets, and whether pulls of the parent go on."""
    user = _there["user"]
    child = os.fork()
    if not child:
        status = user.pull()
        again = user.datadist.Initialize(user.options)
        user.datadist.Finalize()
        os._exit(status == c.LLM_FAILED and again == c.LLM_SUCCESS)
    _, how = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(how), pulls(node)


def test_a_forked_child_has_none_of_the_devices(
    owner: NodeProcess, victim: NodeProcess, path: str
) -> None:
    ports = owner.call(start_owner, 2, path)
    assert victim.call(start_user, ports, path) == c.LLM_SUCCESS
    assert victim.call(call_in_a_child) == (1, True)


# -- struck at random --

FEW = list(range(4))
#: the longest delay of a strike, in seconds: longer than most of the calls take
LONGEST_S = 4e-3


class Struck:
    """A user whose calls are struck at random moments, and what must be as before after each."""

    def __init__(self, ports: list[int], path: str) -> None:
        self._user = _there["user"] = Several(2, len(ports), path, 1000)
        self._ports = ports
        self._datadist = self._user.datadist
        self._allocated: list[int] = []
        assert self._user.link(ports) == c.LLM_SUCCESS
        self.calls = (self._pull, self._push, self._copy, self._allocate, self._relink)

    def _pull(self) -> c.Status:
        return self._datadist.PullKvBlocks(c.CacheIndex(1, 1), self._user.cache, FEW, FEW)

    def _push(self) -> c.Status:
        return self._datadist.PushKvBlocks(self._user.cache, c.CacheIndex(1, 1), FEW, FEW)

    def _copy(self) -> c.Status:
        cache = self._user.cache
        return self._datadist.CopyKvBlocks(cache, cache, FEW, [[8, 9, 10, 11]])

    def _allocate(self) -> c.Status:
        desc = c.CacheDesc(num_tensors=2, data_type=c.DataType.DT_INT8, shape=[4, 4096])
        status, cache = self._datadist.AllocateCache(desc)
        return status or self._datadist.DeallocateCache(cache.cache_id)

    def _relink(self) -> c.Status:
        infos = [c.ClusterInfo(1, 0, [], [c.IpInfo("127.0.0.1", port) for port in self._ports])]
        status = self._datadist.UnlinkLlmClusters(infos, 3000)[0]
        return status or self._user.link(self._ports, 1000)

    def is_as_before(self) -> str:
        """Empty when it is: links on all devices or on none, and calls work."""
        devices = len(self._ports)
        if not eventually(lambda: len(self._datadist.links()) in (0, devices)):
            return f"{len(self._datadist.links())} links"
        if not eventually(lambda: self._user.link(self._ports, 1000) in _LINKED):
            return "it cannot be linked"
        statuses = [call() for call in self.calls]
        return "" if not any(statuses) else f"statuses {statuses}"


_LINKED = (c.LLM_SUCCESS, c.LLM_ALREADY_LINK)


def strike_at_random(node: Node, ports: list[int], path: str, count: int) -> tuple[int, list[str]]:
    """How many calls were interrupted, and what was wrong then."""
    struck, rng, wrong = Struck(ports, path), random.Random(7), []
    interrupted = 0
    with interrupts():
        for _ in range(count):
            call = rng.choice(struck.calls)
            with suppress(LLMException):
                interrupted += is_interrupted(call, rng.uniform(1e-5, LONGEST_S))
            what = struck.is_as_before()
            if what:
                wrong.append(f"{call.__name__}: {what}")
    with takes_at_most(SOON_S):
        stop(node)
    return interrupted, wrong


def test_after_many_interruptions_all_devices_are_as_before(
    owner: NodeProcess, victim: NodeProcess, path: str
) -> None:
    ports = owner.call(start_owner, 2, path)
    count = effort.rounds(150)
    victim.begin(strike_at_random, ports, path, count)
    interrupted, wrong = cast("tuple[int, list[str]]", victim.result(100))
    assert wrong == []
    assert interrupted > 50 / 60 * count
