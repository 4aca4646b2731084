"""An owner that frees, unregisters and re-uses its memory while it is pulled from and pushed to."""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from soak.churning import (
    BY_ID,
    BY_KEY,
    NUM_KEYS,
    Known,
    change,
    is_torn,
    open_memories,
    words_of,
)
from soak.ends import SMALL, Framed, Setting, start, start_owner
from soak.stage import Doing, Stage
from soak.tally import SCHEDULING_S
from soak.verbs import SUCCESS, Deal, do

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.testing.cluster import Node
    from soak.ends import Place, Shape
    from soak.tally import Tally

GONE = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
#: a link is kept for so many rounds, and so are the tables and answers remembered with it
ROUNDS_PER_LINK = 20
CHANGES = 8
PULLERS = 2
SHAPES: list[Shape] = [(2, 8, 512), (4, 16, 4096), (4, 8, 1 << 15)]


def churn(rounds: int, tally: Tally) -> None:
    """Each pull is a typed error, or the bytes of what was named; each push lands there only."""
    rng = random.Random(tally.seed)
    with Stage(tally) as stage:
        while rounds > 0:
            setting = Setting.draw(rng, (2000,), SHAPES)
            count = min(rounds, ROUNDS_PER_LINK)
            rounds -= count
            with stage.round(f"churn, {setting}"):
                _churn(stage, tally, rng, setting, count)
        stage.note_leaks()


def _churn(stage: Stage, tally: Tally, rng: random.Random, setting: Setting, count: int) -> None:
    place = stage.victim.call(start_owner, 1, setting, rng.randrange(1 << 30))
    known = stage.victim.call(open_memories, setting, rng.randrange(1 << 30))
    quiet = setting.with_shape(SMALL)
    other = stage.other.call(start_owner, 3, quiet, 5)
    start(stage.node, LLMRole.DECODER, 2, setting)
    for each in (place, other):
        stage.node.link(each.port, each.cluster_id)
    pullers = [Puller(stage.node, setting, rng.randrange(1 << 30)) for _ in range(PULLERS)]
    keys_of: dict[int, int | None] = {}
    for _ in range(count):
        keys_of.update(known.keys_of)
        known = _round(stage, tally, pullers, known, rng.randrange(1 << 30), keys_of)
        beside = do(stage.node, Deal("pull", other, quiet, rng.randrange(1 << 30), 0))
        if beside.status != SUCCESS or beside.wrong:
            tally.failure(f"a bystander's pull: {beside} ({setting})")
        if rng.random() < 0.1:
            _relink(stage.node, tally, place)
        tally.round(max(puller.slowest_s for puller in pullers) - setting.timeout_s)
    if count == ROUNDS_PER_LINK and not all(p.moved and p.gone for p in pullers):
        tally.failure(f"nothing was met in the middle of a change: {setting}")


def _relink(node: Node, tally: Tally, place: Place) -> None:
    statuses = [node.unlink(place.port, 1), node.link(place.port, 1)]
    if statuses != [SUCCESS, SUCCESS]:
        tally.failure(f"unlinking and linking ended with {statuses}")


def _round(
    stage: Stage,
    tally: Tally,
    pullers: list[Puller],
    known: Known,
    seed: int,
    keys_of: dict[int, int | None],
) -> Known:
    """The owner changes things while all pull; then what there is by now must be had."""
    ended = threading.Event()
    stage.victim.begin(change, seed, CHANGES)
    calls = [Doing(lambda puller=puller: puller.pull_until(ended, known)) for puller in pullers]  # type: ignore[misc]  # which puller
    try:
        after = stage.victim.result()
    finally:
        ended.set()
    assert isinstance(after, Known)
    for call in calls:
        call.result()
    keys_of.update(after.keys_of)
    if after.wrong:
        tally.failure(f"at the owner: {after.wrong} ({pullers[0].setting})")
    for puller in pullers:
        puller.pull_all(after)
        for wrong in puller.what_was_wrong(keys_of):
            tally.failure(f"{wrong} ({puller.setting})")
    return after


class Puller:
    """A thread's memory to pull into and to push from, and what it saw."""

    def __init__(self, node: Node, setting: Setting, seed: int) -> None:
        self.setting = setting
        self._manager = node.manager
        self._rng = random.Random(seed)
        tensors, blocks, nbytes = setting.shape
        self._blocks = Framed(node, setting.shape)
        self._row = Framed(node, (tensors, 1, nbytes), row_keys=())
        self._sources = Framed(node, setting.shape), Framed(node, (tensors, 1, nbytes), row_keys=())
        self._every = list(range(blocks))
        self._wrong: list[str] = []
        #: the caches whose bytes came for a key
        self._seen: list[tuple[int, int]] = []
        self.slowest_s = 0.0
        #: calls that succeeded, and those that were told that the cache is gone
        self.moved = self.gone = 0

    def pull_until(self, ended: threading.Event, known: Known) -> None:
        """Asks at random for what there was before the owner's changes began."""
        asks: list[Callable[[Known], object]] = [self._pull_blocks, self._pull_row]
        asks += [self._push_blocks, self._push_row] if self.setting.is_accessible else []
        asks += [] if self.setting.is_accessible else [self._pull_by_request]
        while not ended.is_set():
            self._rng.choice(asks)(known)

    def pull_all(self, known: Known) -> None:
        """What is there now, while nothing changes."""
        for key, cache_id in known.by_key.items():
            came = self._ask_blocks(key, self._every)
            if came not in (cache_id, None if self.setting.is_accessible else cache_id):
                self._wrong.append(f"key {key} names {cache_id}, but the bytes are {came}'s")
        for cache_id in known.rows:
            if not self._ask_row(cache_id):
                self._wrong.append(f"cache {cache_id} is there, and could not be pulled")

    def what_was_wrong(self, keys_of: dict[int, int | None]) -> list[str]:
        wrong, self._wrong = self._wrong, []
        newest: dict[int, int] = {}
        for key, cache_id in self._seen:
            if keys_of.get(cache_id) != key:
                wrong.append(f"key {key} led to cache {cache_id}, which never had it")
            if newest.get(key, 0) > cache_id:
                wrong.append(f"key {key} led from cache {newest[key]} back to {cache_id}")
            newest[key] = cache_id
        self._seen = []
        if self.slowest_s > 1.2 * self.setting.timeout_s + SCHEDULING_S:
            wrong.append(f"a call took {self.slowest_s:.3f} s")
        return wrong

    def _pull_blocks(self, known: Known) -> None:
        blocks = self._rng.sample(self._every, self._rng.randint(1, len(self._every)))
        self._ask_blocks(self._rng.choice([*range(NUM_KEYS), *known.by_key]), blocks)

    def _ask_blocks(self, key: int, src: list[int]) -> int | None:
        """The cache whose bytes came; None when it is gone, or all of it was pushed to."""
        dst = self._rng.sample(self._every, len(src))
        cache = self._blocks.cache
        call = lambda: self._manager.pull_blocks(BlocksCacheKey(1, key), cache, src, dst)  # noqa: E731
        if not self._succeeds(call, self._blocks, dst):
            return 0
        words = np.unique(words_of(self._blocks.blocks[:, dst]))
        pushed = BY_KEY | key
        owners = [int(word) for word in words if int(word) != pushed]
        # a pull may meet a push half way through a word: that is the two callers' affair
        owners = [word for word in owners if not any(is_torn(word, pushed, o) for o in owners)]
        self._reset(self._blocks)
        if len(owners) > 1 or any(word >= BY_ID for word in owners):
            self._wrong.append(f"a pull of key {key} has bytes of {[hex(w) for w in owners]}")
        elif owners:
            self._seen.append((key, owners[0]))
            return owners[0]
        return None

    def _pull_row(self, known: Known) -> None:
        if known.rows:
            self._ask_row(self._rng.choice(known.rows))

    def _ask_row(self, cache_id: int) -> bool:
        row = self._rng.choice(self._every)
        key = CacheKeyByIdAndIndex(1, cache_id, row)
        if not self._succeeds(
            lambda: self._manager.pull_cache(key, self._row.cache), self._row, [0]
        ):
            return False
        words = {int(word) for word in np.unique(words_of(self._row.blocks))}
        if not words <= {cache_id, BY_ID | cache_id}:
            self._wrong.append(f"a pull of cache {cache_id} has {[hex(w) for w in words]}")
        self._reset(self._row)
        return True

    def _pull_by_request(self, known: Known) -> None:
        if not known.requests:
            return
        request, cache_id = self._rng.choice(list(known.requests.items()))
        key = CacheKey(1, request)
        if self._succeeds(lambda: self._manager.pull_cache(key, self._row.cache), self._row, [0]):
            if not (words_of(self._row.blocks) == cache_id).all():
                self._wrong.append(f"a pull of request {request} is not all of cache {cache_id}")
            self._reset(self._row)

    def _push_blocks(self, known: Known) -> None:
        source, key = self._sources[0], self._rng.choice([*range(NUM_KEYS), *known.by_key])
        words_of(source.whole)[:] = BY_KEY | key
        blocks = self._rng.sample(self._every, self._rng.randint(1, len(self._every)))
        self._succeeds(
            lambda: self._manager.push_blocks(BlocksCacheKey(1, key), source.cache, blocks, blocks),
            self._blocks,
            [],
        )

    def _push_row(self, known: Known) -> None:
        if known.rows:
            source, cache_id = self._sources[1], self._rng.choice(known.rows)
            words_of(source.whole)[:] = BY_ID | cache_id
            key = CacheKeyByIdAndIndex(1, cache_id, self._rng.choice(self._every))
            self._succeeds(lambda: self._manager.push_cache(key, source.cache), self._blocks, [])

    def _succeeds(self, call: Callable[[], object], dst: Framed, blocks: list[int]) -> bool:
        """Whether what was named is there; all else that fails is noted."""
        begun = time.monotonic()
        try:
            call()
        except LLMException as error:
            self.gone += 1
            if error.status_code != GONE:
                self._wrong.append(f"{error.status_code}: {error}")
            return False
        finally:
            self.slowest_s = max(self.slowest_s, time.monotonic() - begun)
            wrong = dst.damage(blocks)
            self._wrong += [wrong] if wrong else []
            if wrong or blocks:
                self._stain(dst, blocks)
        self.moved += 1
        return True

    @staticmethod
    def _stain(dst: Framed, blocks: list[int]) -> None:
        """Other blocks than those of the last call are those that must stay, from here on."""
        dst.before[:, blocks] = dst.blocks[:, blocks]

    @staticmethod
    def _reset(framed: Framed) -> None:
        framed.wipe()
        framed.before[:] = framed.blocks
