"""What the ends of a link do to each other again and again, each success compared with its source.

`do` runs in whichever process shall be the one that asks: the test's, or the one to be harmed.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from llm_datadist import (
    BlocksCacheKey,
    CacheKey,
    LayerSynchronizer,
    LLMException,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist.testing.cluster import Node, make_array
from soak.ends import HELD, KEYS, Framed, Place, Setting

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
SUCCESS = LLMStatusCode.LLM_SUCCESS
#: what a call may end with when its peer is dead, stopped, or has taken its memory back
TYPED = {
    LLMStatusCode.LLM_TIMEOUT,
    LLMStatusCode.LLM_NOT_YET_LINK,
    LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
}
#: what linking and unlinking may end with, too
LINK_TYPED = {
    *TYPED,
    LLMStatusCode.LLM_LINK_FAILED,
    LLMStatusCode.LLM_UNLINK_FAILED,
    LLMStatusCode.LLM_ALREADY_LINK,
    LLMStatusCode.LLM_FAILED,
}


@dataclass(frozen=True)
class Deal:
    """What is to be done, with whose memory, and for how long."""

    verb: str
    place: Place
    setting: Setting
    seed: int
    budget_s: float
    #: somebody else writes to the targets meanwhile
    is_beside: bool = False

    @property
    def targets(self) -> list[int]:
        """The blocks of the peer that may be written to."""
        return list(range(0, self.setting.shape[1], 2)) if self.writes else []

    @property
    def writes(self) -> bool:
        return self.verb in ("push", "transfer")


@dataclass(frozen=True)
class Ending:
    """How it ended: the last status, the slowest call, the number of calls, and what was wrong."""

    status: LLMStatusCode
    message: str
    slowest_s: float
    moved: int
    wrong: str
    #: blocks of ours and of the peer's in a push that succeeded and could not be read back
    unread: tuple[list[int], list[int]] | None = None


class WrongBytesError(AssertionError):
    """A call said that it had moved bytes, and they are others."""


def verbs_of(setting: Setting) -> list[str]:
    """Pushes are for the remote-accessible mode, request keys for the other."""
    return ["pull", "transfer", "link", "push" if setting.is_accessible else "release"]


def do(node: Node, deal: Deal) -> Ending:
    """Until a call fails, or the time is over; then the memory is given back and overwritten."""
    doer = Doer(node, deal)
    ends_at = time.monotonic() + deal.budget_s
    status, message, wrong = SUCCESS, "", ""
    try:
        doer.once()
        while time.monotonic() < ends_at:
            doer.once()
    except LLMException as error:
        status, message = error.status_code, str(error)
    except WrongBytesError as error:
        wrong = str(error)
    wrong = wrong or doer.give_back()
    return Ending(status, message, doer.slowest_s, doer.moved, wrong, doer.unread)


class Doer:
    """Does one verb of a deal, and has the memory for it."""

    def __init__(self, node: Node, deal: Deal) -> None:
        self._node = node
        self._deal = deal
        self._setting = deal.setting
        self._rng = random.Random(deal.seed)
        self._theirs = make_array(deal.setting.shape, deal.place.seed)
        self._key = BlocksCacheKey(deal.place.cluster_id, 0)
        self._dst: list[int] = []
        self.slowest_s = 0.0
        self.moved = 0
        self.unread: tuple[list[int], list[int]] | None = None
        self.once: Callable[[], None] = getattr(self, f"_{deal.verb}")
        self._blocks = Framed(node, deal.setting.shape)
        self._source = Framed(node, deal.setting.shape, deal.seed)
        self._row = Framed(node, deal.setting.row_shape, row_keys=())
        #: where the pull that runs now puts its first byte
        HELD.row_in_flight = self._row.blocks
        HELD.ready.set()

    def give_back(self) -> str:
        """What was damaged, or came although it was not asked for."""
        rows = [0] if self._deal.verb == "release" else []
        wrong = self._blocks.damage(self._dst) or self._row.damage(rows) or self._source.damage([])
        for framed in (self._blocks, self._source, self._row):
            self._timed(partial(self._node.manager.unregister_cache, framed.cache.cache_id))
            framed.give_back()
        return wrong

    def _timed(self, call: Callable[[], T]) -> T:
        begun = time.monotonic()
        try:
            return call()
        finally:
            self.slowest_s = max(self.slowest_s, time.monotonic() - begun)

    def _some(self, blocks: list[int]) -> list[int]:
        return self._rng.sample(blocks, self._rng.randint(1, len(blocks)))

    def _pull(self) -> None:
        step = 2 if self._deal.is_beside else 1
        src = self._some(list(range(step - 1, self._setting.shape[1], step)))
        dst = self._rng.sample(range(self._setting.shape[1]), len(src))
        self._fetch(src, dst)
        if not np.array_equal(self._blocks.blocks[:, dst], self._theirs[:, src]):
            raise WrongBytesError(f"a pull of blocks {src} to {dst} succeeded with other bytes")
        self._taken()

    def _fetch(self, src: list[int], dst: list[int]) -> None:
        self._dst, cache = dst, self._blocks.cache
        self._timed(lambda: self._node.manager.pull_blocks(self._key, cache, src, dst))

    def _taken(self) -> None:
        """What came is right: the destination is as it was."""
        self.moved += 1
        wrong = self._blocks.damage(self._dst)
        if wrong:
            raise WrongBytesError(wrong)
        self._blocks.blocks[:, self._dst] = self._blocks.before[:, self._dst]

    def _push(self) -> None:
        dst = self._some(self._deal.targets)
        src = self._rng.sample(range(self._setting.shape[1]), len(dst))
        cache = self._source.cache
        self._timed(lambda: self._node.manager.push_blocks(self._key, cache, src, dst))
        self._read_back(src, dst)

    def _read_back(self, src: list[int], dst: list[int]) -> None:
        self.unread = src, dst
        self._fetch(dst, dst)
        self.unread = None
        if not np.array_equal(self._blocks.blocks[:, dst], self._source.blocks[:, src]):
            raise WrongBytesError(f"{self._deal.verb} of {src} to {dst} put other bytes there")
        self._taken()

    def _transfer(self) -> None:
        dst = self._some(self._deal.targets)
        src = self._rng.sample(range(self._setting.shape[1]), len(dst))
        layers = range(self._setting.shape[0] // 2)
        place, manager = self._deal.place, self._node.manager
        configs: list[TransferConfig] | list[TransferWithCacheKeyConfig]
        if self._setting.is_accessible:
            configs = [TransferWithCacheKeyConfig(self._key, layers, layers)]
        else:
            configs = [TransferConfig(place.cluster_id, place.addrs, layers)]

        def run() -> None:
            task = manager.transfer_cache_async(self._source.cache, EachLayer(), configs, src, dst)
            status = task.synchronize(10 * self._setting.timeout_ms)
            if status != SUCCESS:
                raise LLMException(f"the transfer ended with {status}", status)

        self._timed(run)
        self._read_back(src, dst)

    def _release(self) -> None:
        """A row by its request key, which the owner then lets go of."""
        request = min(self.moved, KEYS - 1)
        key = CacheKey(self._deal.place.cluster_id, request)
        self._timed(lambda: self._node.manager.pull_cache(key, self._row.cache))
        theirs = make_array(self._setting.row_shape, self._deal.place.seed + 1 + request)
        if not np.array_equal(self._row.blocks, theirs):
            raise WrongBytesError(f"a pull of row {request} succeeded with other bytes")
        wrong = self._row.damage([0])
        if wrong:
            raise WrongBytesError(wrong)
        self._row.wipe()
        self.moved += 1

    def _link(self) -> None:
        place, timeout_ms = self._deal.place, self._setting.timeout_ms
        for what in (self._node.unlink, self._node.link):
            status = self._timed(partial(what, place.port, place.cluster_id, timeout_ms))
            if status != SUCCESS:
                raise LLMException(f"{what.__name__} ended with {status}", status)
        self._pull()


class EachLayer(LayerSynchronizer):
    """Has every layer ready."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True
