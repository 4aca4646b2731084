"""A round in which an end is killed, stopped or restarted: its chance, its judgement."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist.testing.cluster import Node, NodeProcess, make_array
from soak.ends import Place, Setting
from soak.stage import Doing, Stage
from soak.tally import SCHEDULING_S
from soak.verbs import SUCCESS, Deal, Ending, do, verbs_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from llm_datadist import LLMStatusCode
    from llm_datadist.testing.cluster import Bytes
    from soak.tally import Tally


class Round:
    """One round: its chance, its stage, and what it saw."""

    def __init__(self, tally: Tally, stage: Stage, rng: random.Random, setting: Setting) -> None:
        self._tally, self.stage, self.rng, self.setting = tally, stage, rng, setting
        self.verb = rng.choice(verbs_of(setting))
        self.seed = rng.randrange(1 << 30)
        self.over_s = float("-inf")

    @property
    def node(self) -> Node:
        return self.stage.node

    def must(self, is_so: bool, what: str) -> None:
        if not is_so:
            self._tally.failure(f"{what} ({self.verb}, {self.setting})")

    def deal(self, place: Place, budget_s: float, verb: str = "") -> Deal:
        seed = self.rng.randrange(1 << 30)
        return Deal(verb or self.verb, place, self.setting, seed, budget_s)

    def beside(self, place: Place, setting: Setting | None = None) -> Deal:
        """Pulls of a bystander, or from one, for as long as somebody is harmed."""
        return Deal("pull", place, setting or self.setting, self.seed, 0.4, is_beside=True)

    def judge(
        self, ending: Ending, *allowed: Collection[LLMStatusCode], is_timed: bool = True
    ) -> None:
        self.must(not ending.wrong, ending.wrong)
        is_allowed = any(ending.status in statuses for statuses in allowed)
        self.must(is_allowed, f"ended with {ending.status}: {ending.message}")
        if is_timed:
            timeout_s = self.setting.timeout_s
            self.over_s = max(self.over_s, ending.slowest_s - timeout_s)
            is_in_time = ending.slowest_s <= 1.2 * timeout_s + SCHEDULING_S
            self.must(is_in_time, f"a call took {ending.slowest_s:.3f} s")

    def unharmed(self, ending: Ending) -> None:
        self.judge(ending, {SUCCESS})
        self.must(ending.moved > 0 or ending.status != SUCCESS, "no bytes were moved")

    def here(self, deal: Deal) -> Ending:
        ending: Ending = Doing(lambda: do(self.node, deal)).result()
        return ending

    def link(self, place: Place) -> None:
        status = self.node.link(place.port, place.cluster_id)
        self.must(status == SUCCESS, f"linking again ended with {status}")

    def link_from(self, process: NodeProcess, place: Place) -> None:
        status = process.call(Node.link, place.port, place.cluster_id)
        self.must(status == SUCCESS, f"linking again from the other end ended with {status}")

    def moment(self, longest_s: float = 0.1) -> None:
        """A random moment passes."""
        threading.Event().wait(self.rng.uniform(0, longest_s))

    def took_back(self, deal: Deal, ending: Ending | None, given: tuple[str, Bytes]) -> None:
        """Nothing but targets changed, and a push that succeeded is there."""
        wrong, found = given
        self.must(not wrong, f"at the owner: {wrong}")
        if ending is not None and ending.unread is not None:
            src, dst = ending.unread
            pushed = make_array(self.setting.shape, deal.seed)[:, src]
            self.must(np.array_equal(found[:, dst], pushed), f"{deal.verb} was no success")


def play(
    rounds: int, tally: Tally, timeouts_ms: tuple[int, ...], *kinds: Callable[[Round], None]
) -> None:
    rng = random.Random(tally.seed)
    with Stage(tally) as stage:
        for _ in range(rounds):
            setting, kind = Setting.draw(rng, timeouts_ms), rng.choice(kinds)
            one = Round(tally, stage, rng, setting)
            with stage.round(f"{kind.__name__}, {one.verb}, {setting}"):
                kind(one)
            tally.round(one.over_s)
        stage.note_leaks()
