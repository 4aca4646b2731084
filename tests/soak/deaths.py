"""Ends of links that are killed, stopped and restarted at random moments, whatever they do."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from llm_datadist import LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess
from llm_datadist.testing.timing import eventually
from soak.ends import (
    HELD,
    PATTERN,
    SMALL,
    Place,
    Setting,
    give_back,
    late_bytes,
    linked_ids,
    own,
    start,
    start_owner,
)
from soak.rounds import Round, play
from soak.stage import Doing
from soak.verbs import LINK_TYPED, SUCCESS, TYPED, Ending, do

if TYPE_CHECKING:
    from soak.tally import Tally

INVALID = LLMStatusCode.LLM_PARAM_INVALID
#: how soon the death of a peer is noticed, which the kernel tells at once
SOON_S = 1.0
FOR_EVER_S = 20.0
BRIEFLY_S = 0.02


def kill_owner(rounds: int, tally: Tally) -> None:
    """The owner dies while it is pulled from, pushed to, linked or unlinked, or holds a key."""
    play(rounds, tally, (500, 1000), _kill_owner)


def kill_puller(rounds: int, tally: Tally) -> None:
    """The end that asks dies: the owner gets its memory back, and takes the next one."""
    play(rounds, tally, (500, 1000), _kill_puller)


def stop_and_continue(rounds: int, tally: Tally) -> None:
    """An end stands still for longer than the timeout: nothing arrives in what was given back."""
    play(rounds, tally, (500, 700), _stop_owner, _stop_puller)


def restarts(rounds: int, tally: Tally) -> None:
    """Peers come back, or are replaced, under their old ids: only the last one's bytes come."""
    play(rounds, tally, (500, 1000), _restart_twice, _replace_owner, _replace_caller)


def _two_owners(one: Round) -> tuple[Place, Place, Setting]:
    """The victim's place and the bystander's, both linked to from here; the latter's setting."""
    quiet = one.setting.with_shape(SMALL)
    place = one.stage.victim.call(start_owner, 1, one.setting, one.seed)
    other = one.stage.other.call(start_owner, 3, quiet, one.seed)
    start(one.node, LLMRole.DECODER, 2, one.setting)
    one.link(place)
    one.link(other)
    return place, other, quiet


def _two_callers(one: Round) -> Place:
    """Our own place; the victim and the bystander are linked to it."""
    place = start_owner(one.node, 1, one.setting, one.seed)
    for process, cluster_id in ((one.stage.victim, 2), (one.stage.other, 3)):
        process.call(start, LLMRole.DECODER, cluster_id, one.setting)
        one.link_from(process, place)
    return place


def _kill_owner(one: Round) -> None:
    place, other, quiet = _two_owners(one)
    successor = NodeProcess()  # boots meanwhile
    deal, beside = one.deal(place, FOR_EVER_S), one.beside(other, quiet)
    doing = Doing(lambda: do(one.node, deal))
    HELD.ready.wait(10)
    pulling = Doing(lambda: do(one.node, beside))
    one.moment()
    if one.verb == "release":
        _pause_in_a_pull(one)
    one.stage.replace(successor)
    one.judge(doing.result(), LINK_TYPED if one.verb == "link" else TYPED)
    one.must(eventually(lambda: linked_ids(one.node) == [3], SOON_S), "the death is not noticed")
    one.unharmed(pulling.result())
    place = successor.call(start_owner, 1, one.setting, one.seed + 1, place.port)
    one.link(place)
    one.unharmed(one.here(one.deal(place, BRIEFLY_S)))
    one.must(not late_bytes(one.node), late_bytes(one.node))


def _pause_in_a_pull(one: Round) -> None:
    """The owner stands still: over cma the pull ends without it, and waits to release the key."""
    row = HELD.row_in_flight
    assert row is not None
    eventually(lambda: bool(row[0, 0, 0] != PATTERN), 0.1)
    one.stage.victim.pause()
    one.moment(0.05)


def _kill_puller(one: Round) -> None:
    place = _two_callers(one)
    successor = NodeProcess()  # boots meanwhile
    deal = one.deal(place, FOR_EVER_S)
    one.stage.other.begin(do, one.beside(place))
    one.stage.victim.begin(do, deal)
    one.moment(0.3)
    one.stage.replace(successor)
    one.must(eventually(lambda: linked_ids(one.node) == [3], SOON_S), "the death is not noticed")
    one.unharmed(_ending_of(one.stage.other))
    begun = time.monotonic()
    one.took_back(deal, None, give_back(one.node, deal.targets))
    one.over_s = max(one.over_s, time.monotonic() - begun - one.setting.timeout_s)
    place = Place(1, place.port, own(one.node, one.setting, one.seed + 1), one.seed + 1)
    successor.call(start, LLMRole.DECODER, 2, one.setting)
    one.link_from(successor, place)
    one.unharmed(successor.call(do, one.deal(place, BRIEFLY_S)))
    one.must(not late_bytes(one.node), late_bytes(one.node))


def _ending_of(process: NodeProcess) -> Ending:
    ending = process.result()
    assert isinstance(ending, Ending)
    return ending


def _stop_owner(one: Round) -> None:
    place, other, quiet = _two_owners(one)
    victim, timeout_s = one.stage.victim, one.setting.timeout_s
    deal, beside = one.deal(place, 1.5 * timeout_s + 0.2), one.beside(other, quiet)
    doing = Doing(lambda: do(one.node, deal))
    HELD.ready.wait(10)
    pulling = Doing(lambda: do(one.node, beside))
    one.moment()
    victim.pause()
    try:
        threading.Event().wait(1.1 * timeout_s)
        ending: Ending = doing.result()
        one.unharmed(pulling.result())
    finally:
        victim.resume()
    one.judge(ending, {SUCCESS}, LINK_TYPED if one.verb == "link" else TYPED)
    if one.verb == "link":
        one.node.unlink(place.port, 1, force=True)
        one.link(place)
    one.must(linked_ids(one.node) == [1, 3], "a link ended")
    one.took_back(deal, ending, victim.call(give_back, deal.targets))
    place = Place(1, place.port, victim.call(own, one.setting, one.seed + 1), one.seed + 1)
    one.unharmed(one.here(one.deal(place, BRIEFLY_S)))
    for wrong in (late_bytes(one.node), victim.call(late_bytes)):
        one.must(not wrong, wrong)


def _stop_puller(one: Round) -> None:
    place = _two_callers(one)
    victim, timeout_s = one.stage.victim, one.setting.timeout_s
    deal = one.deal(place, 2 * timeout_s)
    one.stage.other.begin(do, one.beside(place))
    victim.begin(do, deal)
    one.moment(0.3)
    victim.pause()
    try:
        threading.Event().wait(1.1 * timeout_s)
        one.unharmed(_ending_of(one.stage.other))
        given = give_back(one.node, deal.targets)
    finally:
        victim.resume()
    ending = _ending_of(victim)
    gone = {INVALID} if one.verb == "transfer" else set()  # addresses that are nobody's by now
    typed = LINK_TYPED if one.verb == "link" else TYPED
    one.judge(ending, {SUCCESS}, typed, gone, is_timed=False)
    one.took_back(deal, ending, given)
    if one.verb == "link":
        victim.call(Node.unlink, place.port, 1, force=True)
        one.link_from(victim, place)
    place = Place(1, place.port, own(one.node, one.setting, one.seed + 1), one.seed + 1)
    one.unharmed(victim.call(do, one.deal(place, BRIEFLY_S)))
    for wrong in (late_bytes(one.node), victim.call(late_bytes)):
        one.must(not wrong, wrong)


def _restart_twice(one: Round) -> None:
    place, other, quiet = _two_owners(one)
    for turn in (1, 2):
        one.unharmed(one.here(one.deal(place, BRIEFLY_S)))
        if one.rng.random() < 0.5:
            one.stage.replace(NodeProcess())
        else:
            one.stage.victim.call(Node.stop)
        if one.rng.random() < 0.5:
            one.judge(one.here(one.deal(place, 1.0, "pull")), TYPED)
        if one.rng.random() < 0.5:
            one.node.unlink(place.port, 1, force=True)
        seed = one.seed + 10 * turn
        place = one.stage.victim.call(start_owner, 1, one.setting, seed, place.port)
        one.link(place)
    one.unharmed(one.here(one.deal(place, BRIEFLY_S)))
    one.unharmed(one.here(one.beside(other, quiet)))


def _replace_owner(one: Round) -> None:
    """The owner was stopped, and continues when another has its id, at another port."""
    stale = one.stage.victim.call(start_owner, 1, one.setting, one.seed)
    start(one.node, LLMRole.DECODER, 2, one.setting)
    one.link(stale)
    one.unharmed(one.here(one.deal(stale, BRIEFLY_S)))
    is_forced = one.rng.random() < 0.5
    one.stage.victim.pause()
    try:
        if is_forced:
            one.node.unlink(stale.port, 1, force=True)
        place = one.stage.other.call(start_owner, 1, one.setting, one.seed + 10)
        one.link(place)
        one.unharmed(one.here(one.deal(place, BRIEFLY_S, "pull")))
    finally:
        one.stage.victim.resume()
    one.unharmed(one.here(one.deal(place, 0.1, "pull")))
    if is_forced:
        is_gone = eventually(lambda: one.stage.victim.call(linked_ids) == [])
        one.must(is_gone, "the stale owner does not notice")
    else:
        status = one.node.unlink(stale.port, 1)
        one.must(status == SUCCESS, f"unlinking the stale owner ended with {status}")
    one.unharmed(one.here(one.deal(place, BRIEFLY_S)))


def _replace_caller(one: Round) -> None:
    """A caller was stopped, and continues when another has its id and has linked to us."""
    ours = start_owner(one.node, 1, one.setting, one.seed)
    victim, successor = one.stage.victim, one.stage.other
    stale = victim.call(start_owner, 2, one.setting, one.seed + 10)
    one.link_from(victim, ours)
    victim.pause()
    try:
        place = successor.call(start_owner, 2, one.setting, one.seed + 20)
        one.must(stale.port != place.port, "both have one port")
        one.link_from(successor, ours)
        one.unharmed(one.here(one.deal(place, BRIEFLY_S, "pull")))
    finally:
        victim.resume()
    one.judge(victim.call(do, one.deal(ours, BRIEFLY_S, "pull")), {SUCCESS}, TYPED)
    one.unharmed(one.here(one.deal(place, 0.1, "pull")))
    one.unharmed(successor.call(do, one.deal(ours, BRIEFLY_S, "pull")))
