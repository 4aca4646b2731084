"""TCP connections that are cut at random bytes: of pulls, of pushes and of links being made."""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_datadist import BlocksCacheKey, LLMException, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, make_array
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import eventually
from soak.tally import descriptors, threads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from soak.tally import Tally

SUCCESS = LLMStatusCode.LLM_SUCCESS
SHAPE = (4, 16, 1 << 16)
FILL = 0xEE
TIMEOUT_MS = 1000
DEADLINE_S = TIMEOUT_MS / 1000
SOON_S = 2.0
#: threads and streams that are kept for the next call, and were not needed so far
ALLOWED = 8
OWNER, BYSTANDER = 1, 3
#: our memory: what is pulled into, and what is pushed from
SINK, SOURCE = 1, 2
#: their memory: what is pulled, and what is pushed into
THEIRS, INBOX = BlocksCacheKey(OWNER, 0), BlocksCacheKey(OWNER, 1)
Status = LLMStatusCode


def cuts(rounds: int, tally: Tally) -> None:
    """Cuts the connection to the owner while a bystander is linked directly."""
    rng = random.Random(tally.seed)
    with NodeProcess() as owner, NodeProcess() as bystander:
        for is_accessible in (True, False):
            with cluster(owner, bystander, is_accessible=is_accessible) as ends:
                for _ in range(3):  # what is opened once and kept is open then
                    ends.round(rng, tally)
                before = ends.resources()
                for _ in range(max(1, rounds // 2)):
                    ends.round(rng, tally)
                after = eventually_at_most(ends, before)
                for what, count in after.items():
                    tally.leak(what, before[what], count, ALLOWED)


@contextmanager
def cluster(owner: NodeProcess, bystander: NodeProcess, *, is_accessible: bool) -> Iterator[Ends]:
    settings: dict[str, Any] = {
        "enable_remote_cache_accessible": is_accessible,
        "transfer_path": "tcp",
        "sync_kv_timeout": TIMEOUT_MS,
    }
    listen = {"listen_ip_info": "127.0.0.1:0", **settings}
    port = owner.call(Node.start, LLMRole.DECODER, OWNER, **listen)
    other_port = bystander.call(Node.start, LLMRole.PROMPT, BYSTANDER, **listen)
    owner.call(own, OWNER)
    bystander.call(own, BYSTANDER)
    node = Node()
    node.start(LLMRole.PROMPT, 2, **settings)
    node.blocks_cache(*SHAPE)
    node.blocks_cache(*SHAPE, seed=2)
    try:
        with FaultProxy(port) as proxy:
            ends = Ends(node, owner, proxy, is_accessible)
            if node.link(other_port, BYSTANDER, TIMEOUT_MS) != SUCCESS:
                raise AssertionError("the bystander could not be linked")
            yield ends
    finally:
        for process in (owner, bystander):
            process.call(Node.stop)
        node.stop()


@dataclass
class Ends:
    """A node here, an owner behind a proxy, and a bystander that is linked already."""

    node: Node
    owner: NodeProcess
    proxy: FaultProxy
    is_accessible: bool

    def round(self, rng: random.Random, tally: Tally) -> None:
        """Links, moves verified bytes, is cut, and is unlinked at both ends afterwards."""
        self.proxy.restore()
        if rng.random() < 0.2:
            self._cut_link(rng, tally)
            self.proxy.restore()
        with tally.deadline(DEADLINE_S):
            status = self.node.link(self.proxy.port, OWNER, TIMEOUT_MS)
        if status != SUCCESS:
            tally.failure(f"the pair does not link again: {status!r}")
        move = rng.choice((self._pull, self._push)) if self.is_accessible else self._pull
        blocks = self._draw(rng)
        to_caller = rng.random() < 0.7
        before = self.proxy.nbytes_passed(to_caller=to_caller)
        if (status := move(blocks, tally)) != SUCCESS:
            tally.failure(f"{move.__name__} over a network in order: {status!r}")
        needed = self.proxy.nbytes_passed(to_caller=to_caller) - before
        at = rng.randrange(1, max(2, needed))
        self.proxy.cut(at, to_caller=to_caller)
        status = move(blocks, tally)  # it may need fewer bytes than the first, and be done
        if status == SUCCESS and self.proxy.wait():
            tally.failure(f"{move.__name__} was cut at {at} of {needed} bytes, and says success")
        if status not in (SUCCESS, Status.LLM_NOT_YET_LINK):
            tally.failure(f"{move.__name__} that was cut at {at} of {needed} bytes: {status!r}")
        self._check_unlinked(tally)
        if self._pull(self._draw(rng), tally, BYSTANDER) != SUCCESS:
            tally.failure("a link that has nothing to do with it was harmed")
        tally.round(tally.worst_over_s)

    def _cut_link(self, rng: random.Random, tally: Tally) -> None:
        """A link that is cut while it is made, or just after."""
        self.proxy.cut(rng.randrange(400), to_caller=rng.random() < 0.5)
        with tally.deadline(DEADLINE_S):
            status = self.node.link(self.proxy.port, OWNER, TIMEOUT_MS)
        if status in (Status.LLM_TIMEOUT, Status.LLM_PARAM_INVALID):
            tally.failure(f"a link that was cut: {status!r}")
        self._check_unlinked(tally)

    def _check_unlinked(self, tally: Tally) -> None:
        self.proxy.cut()
        if not eventually(self._is_unlinked, SOON_S):
            tally.failure("a cut link is still there")

    def _is_unlinked(self) -> bool:
        return linked_ids(self.node) == [BYSTANDER] and self.owner.call(linked_ids) == []

    def _draw(self, rng: random.Random) -> tuple[list[int], list[int]]:
        count = rng.randrange(1, SHAPE[1] // 2 + 1)
        return rng.sample(range(SHAPE[1]), count), rng.sample(range(SHAPE[1]), count)

    def _pull(
        self, blocks: tuple[list[int], list[int]], tally: Tally, cluster_id: int = OWNER
    ) -> Status:
        src, dst = blocks
        array = self.node.arrays[SINK]
        array[:] = FILL
        key = BlocksCacheKey(cluster_id, 0)
        status = SUCCESS
        with tally.deadline(DEADLINE_S):
            try:
                self.node.manager.pull_blocks(key, self.node.caches[SINK], src, dst)
            except LLMException as error:
                status = error.status_code
        check(array, make_source(cluster_id), blocks, status, tally)
        return status

    def _push(self, blocks: tuple[list[int], list[int]], tally: Tally) -> Status:
        src, dst = blocks
        self.owner.call(refill)
        status = SUCCESS
        with tally.deadline(DEADLINE_S):
            try:
                self.node.manager.push_blocks(INBOX, self.node.caches[SOURCE], src, dst)
            except LLMException as error:
                status = error.status_code
        check(self.owner.call(inbox), make_source(2), blocks, status, tally)
        return status

    def resources(self) -> dict[str, int]:
        return {
            "file descriptors here": descriptors(),
            "threads here": threads(),
            "file descriptors of the owner": descriptors(self.owner.pid),
            "threads of the owner": threads(self.owner.pid),
        }


def eventually_at_most(ends: Ends, before: dict[str, int]) -> dict[str, int]:
    """What is in use once it is no more than before, or after a while."""
    eventually(lambda: all(ends.resources()[what] <= count for what, count in before.items()))
    return ends.resources()


_SOURCES = {seed: make_array(SHAPE, seed) for seed in (OWNER, 2, BYSTANDER)}


def make_source(seed: int) -> Bytes:
    return _SOURCES[seed]


def check(
    array: Bytes,
    source: Bytes,
    blocks: tuple[list[int], list[int]],
    status: Status,
    tally: Tally,
) -> None:
    src, dst = blocks
    if status == SUCCESS and not np.array_equal(array[:, dst], source[:, src]):
        tally.failure("success was reported of bytes that did not come")
    if not (np.delete(array, dst, axis=1) == FILL).all():
        tally.failure("a block that was not asked for was written to")


# -- run by the owner --


def own(node: Node, seed: int) -> None:
    """What is pulled, and what is pushed into."""
    node.blocks_cache(*SHAPE, seed=seed, key=BlocksCacheKey(0, 0))
    node.blocks_cache(*SHAPE, key=BlocksCacheKey(0, 1))


def refill(node: Node) -> None:
    inbox(node)[:] = FILL


def inbox(node: Node) -> Bytes:
    return node.arrays[2]


def linked_ids(node: Node) -> list[int]:
    return [link.cluster_id for link in node.datadist.links()]
