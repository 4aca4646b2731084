"""The plan of a follower, with a clock and dice of the test's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from directory.records import record
from llm_datadist import LLMRole, Wants
from llm_datadist.directory import Change, Changes
from llm_datadist.following.plan import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    MOST_AT_ONCE,
    STEADY_S,
    Cut,
    Leave,
    Link,
    MakeRoom,
    Plan,
)

if TYPE_CHECKING:
    from llm_datadist.directory import Record

US = 1000
FACTS = {"layout": "LBHNC"}


def plan_of(wants: Wants | None = None, dice: float = 1.0) -> Plan:
    return Plan(US, Wants() if wants is None else wants, FACTS, lambda: dice)


def member(cluster_id: int = 1, incarnation: int = 1, **said: object) -> Record:
    said.setdefault("facts", FACTS)
    return record(cluster_id, incarnation, **said)  # type: ignore[arg-type]


def join(plan: Plan, *records: Record, now: float = 0.0) -> list[object]:
    plan.told(Changes(joined=records), now)
    return list(plan.decide(now))


def made(plan: Plan, each: Record, now: float) -> None:
    plan.made(each.cluster_id, each.incarnation, now)
    plan.tried(each, "", now)


def test_who_fits_is_linked_at_once_and_is_left_when_it_leaves() -> None:
    plan, one = plan_of(), member()
    assert join(plan, one) == [Link(one)]
    made(plan, one, 1.0)
    assert plan.members[1].state == "linked"
    plan.told(Changes(left=(one,)), 2.0)
    (action,) = plan.decide(2.0)
    assert isinstance(action, Leave)
    assert action.record == one
    assert not plan.members


@pytest.mark.parametrize(
    ("wants", "said", "reason"),
    [
        (Wants([LLMRole.DECODER]), {}, "its role is PROMPT"),
        (Wants(), {"facts": {"layout": "LBNHC"}}, "its fact 'layout' is 'LBNHC', ours 'LBHNC'"),
        (Wants(), {"facts": {}}, "its fact 'layout' is None, ours 'LBHNC'"),
        (Wants(labels={"zone": "a"}), {"labels": {"zone": "b"}}, "its label 'zone' is 'b'"),
        (Wants(), {"listen": ""}, "it does not listen"),
    ],
)
def test_who_does_not_fit_is_not_linked_and_it_is_said_why(
    wants: Wants, said: dict[str, object], reason: str
) -> None:
    plan = plan_of(wants)
    assert join(plan, member(1, 1, **said)) == []
    assert plan.members[1].state == "unfit"
    assert plan.members[1].objection.startswith(reason)


def test_further_facts_of_others_do_not_matter() -> None:
    each = member(facts={**FACTS, "kernel": "6.1"})
    assert join(plan_of(), each) == [Link(each)]


def test_pauses_grow_up_to_the_longest_and_begin_anew() -> None:
    plan, one, now, pauses = plan_of(), member(), 0.0, []
    join(plan, one)
    for _ in range(12):
        plan.tried(one, "nobody listens", now)
        assert list(plan.decide(now)) == []
        assert plan.members[1].state == "retries"
        assert plan.next_at is not None
        pauses.append(plan.next_at - now)
        now = plan.next_at
        assert list(plan.decide(now)) == [Link(one)]
    assert pauses[:3] == pytest.approx([FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S])
    assert pauses[-1] == pytest.approx(LONGEST_PAUSE_S)
    made(plan, one, now)
    plan.ended(1, one.incarnation, now + STEADY_S)
    assert plan.next_at == pytest.approx(now + STEADY_S + FIRST_PAUSE_S)


def test_a_link_that_does_not_last_is_no_reason_to_hurry() -> None:
    plan, one, now, pauses = plan_of(), member(), 0.0, []
    join(plan, one)
    for _ in range(6):
        made(plan, one, now)
        plan.ended(1, one.incarnation, now)
        assert plan.next_at is not None
        pauses.append(plan.next_at - now)
        now = plan.next_at
        assert list(plan.decide(now)) == [Link(one)]
    assert pauses == sorted(pauses)
    assert pauses[-1] > 16 * FIRST_PAUSE_S


def test_pauses_differ_between_members() -> None:
    short, long = plan_of(dice=0.0), plan_of(dice=1.0)
    for plan in (short, long):
        join(plan, member())
        plan.tried(member(), "nobody listens", 0.0)
    assert short.next_at == pytest.approx(FIRST_PAUSE_S / 2)
    assert long.next_at == pytest.approx(FIRST_PAUSE_S)


def test_a_new_start_is_linked_in_place_of_the_old_one() -> None:
    plan, old, new = plan_of(), member(incarnation=1), member(incarnation=2)
    join(plan, old)
    made(plan, old, 0.0)
    plan.told(Changes(changed=(Change(old, new),)), 1.0)
    assert list(plan.decide(1.0)) == [Cut(new), Link(new)]
    plan.ended(1, old.incarnation, 1.0)  # late news of the old one
    plan.made(1, old.incarnation, 1.0)
    assert plan.members[1].state == "linking"
    made(plan, new, 1.0)
    plan.ended(1, old.incarnation, 1.0)
    assert plan.members[1].state == "linked"


def test_a_new_start_is_not_kept_waiting_by_the_failures_of_the_old_one() -> None:
    plan, old, new = plan_of(), member(incarnation=1), member(incarnation=2)
    join(plan, old)
    for now in (0.0, 1.0, 3.0):
        plan.tried(old, "nobody listens", now)
        list(plan.decide(now + 2))
    plan.told(Changes(changed=(Change(old, new),)), 3.0)
    assert Link(new) in list(plan.decide(3.0))


def test_what_came_of_an_old_start_is_not_taken_for_the_new_one() -> None:
    plan, old, new = plan_of(), member(incarnation=1), member(incarnation=2)
    join(plan, old)
    plan.told(Changes(changed=(Change(old, new),)), 0.0)
    assert Link(new) in list(plan.decide(0.0))
    plan.tried(old, "another process answers there", 0.0)
    assert plan.members[1].state == "linking"


def test_a_role_that_is_not_wanted_any_more_is_left_and_one_that_is_linked() -> None:
    plan = plan_of(Wants([LLMRole.PROMPT]))
    prompt, decoder = member(), member(role="DECODER")
    join(plan, prompt)
    made(plan, prompt, 0.0)
    plan.told(Changes(changed=(Change(prompt, decoder),)), 1.0)
    assert [type(action) for action in plan.decide(1.0)] == [Leave]
    plan.ended(1, prompt.incarnation, 1.0)
    assert list(plan.decide(100.0)) == []
    plan.told(Changes(changed=(Change(decoder, prompt),)), 101.0)
    assert list(plan.decide(101.0)) == [Link(prompt)]


def test_lazily_nobody_is_linked_until_somebody_asks() -> None:
    plan, one = plan_of(Wants(at_once=False)), member()
    assert join(plan, one) == []
    for _ in range(3):
        plan.asked(1, 1.0)
    assert list(plan.decide(1.0)) == [Link(one)]
    made(plan, one, 1.0)
    plan.ended(1, one.incarnation, 2.0)
    assert list(plan.decide(100.0)) == []
    plan.asked(1, 100.0)
    assert list(plan.decide(100.0)) == [Link(one)]
    plan.asked(77, 100.0)  # nobody is there


def test_who_asks_again_and_again_shortens_no_pause() -> None:
    plan, one = plan_of(Wants(at_once=False)), member()
    join(plan, one)
    plan.asked(1, 0.0)
    list(plan.decide(0.0))
    plan.tried(one, "nobody listens", 0.0)
    for step in range(9):
        plan.asked(1, step * FIRST_PAUSE_S / 10)
        assert list(plan.decide(step * FIRST_PAUSE_S / 10)) == []
    assert list(plan.decide(FIRST_PAUSE_S)) == [Link(one)]


def test_no_more_are_linked_than_wanted_and_a_free_place_is_taken() -> None:
    plan = plan_of(Wants(max_links=3))
    everybody = [member(cluster_id) for cluster_id in range(10)]
    chosen = [action.record for action in join(plan, *everybody) if isinstance(action, Link)]
    assert len(chosen) == 3
    for each in chosen:
        made(plan, each, 0.0)
    assert list(plan.decide(0.0)) == []
    plan.told(Changes(left=(chosen[0],)), 1.0)
    actions = list(plan.decide(1.0))
    assert [type(action) for action in actions] == [Leave, Link]
    assert actions[1].record not in chosen


def test_links_of_those_who_do_not_fit_take_no_place() -> None:
    plan = plan_of(Wants([LLMRole.PROMPT], max_links=1))
    unfit, fit, more = member(1, role="DECODER"), member(2), member(3)
    join(plan, unfit)
    plan.made(1, unfit.incarnation, 0.0)  # it has linked to us
    assert join(plan, fit) == [Link(fit)]
    made(plan, fit, 0.0)
    assert plan.yielding() == [fit]
    fits = member(1)
    plan.told(Changes(changed=(Change(unfit, fits),)), 1.0)
    assert join(plan, more, now=1.0) == []  # two are linked
    plan.ended(2, fit.incarnation, 2.0)
    plan.ended(1, fits.incarnation, 2.0)
    (again,) = plan.decide(2.0)
    assert isinstance(again, Link)
    plan.tried(again.record, "nobody is there", 2.0)
    plan.told(Changes(left=(fit, fits, more)), 3.0)
    list(plan.decide(3.0))
    assert len(join(plan, member(4), member(5), now=4.0)) == 1


def test_starts_that_were_replaced_are_remembered_until_they_are_announced_again() -> None:
    plan, old, new = plan_of(), member(1, 1), member(1, 2)
    join(plan, old)
    assert not plan.was_replaced(1, old.incarnation)
    plan.told(Changes(changed=(Change(old, new),)), 1.0)
    assert plan.was_replaced(1, old.incarnation)
    plan.told(Changes(left=(new,)), 2.0)
    assert plan.was_replaced(1, old.incarnation)
    assert not plan.was_replaced(1, new.incarnation)
    join(plan, old, now=3.0)
    assert not plan.was_replaced(1, old.incarnation)


def test_of_starts_that_were_replaced_only_so_many_are_remembered() -> None:
    plan = plan_of(Wants(at_once=False))
    join(plan, member(1, 0))
    for number in range(10_000):
        plan.told(Changes(changed=(Change(member(1, number), member(1, number + 1)),)), 0.0)
        list(plan.decide(0.0))
    plan.told(Changes(left=(member(1, 10_000),)), 1.0)
    assert plan.was_replaced(1, member(1, 9_999).incarnation)
    assert not plan.was_replaced(1, member(1, 0).incarnation)


def test_room_is_made_for_who_is_dead_no_more_often_than_it_is_tried() -> None:
    plan = plan_of(Wants(at_once=False, max_links=1), dice=0.0)
    lives, dead = member(1), member(2)
    join(plan, lives, dead)
    plan.asked(1, 0.0)
    list(plan.decide(0.0))
    made(plan, lives, 0.0)
    num_rooms, now = 0, 0.0
    while now < 60.0:
        now += 0.1
        plan.asked(2, now)
        for action in plan.decide(now):
            if isinstance(action, MakeRoom):
                num_rooms += 1
                plan.ended(1, lives.incarnation, now, has_yielded=True)
                plan.made_room(dead)
                (link,) = (each for each in plan.decide(now) if isinstance(each, Link))
                plan.tried(link.record, "nobody is there", now)
                plan.asked(1, now)
                (link,) = (each for each in plan.decide(now) if isinstance(each, Link))
                made(plan, lives, now)  # at once: it has failed nobody
    assert 5 <= num_rooms <= 12


def test_a_link_that_was_just_made_takes_one_place() -> None:
    plan = plan_of(Wants(at_once=False, max_links=2))
    one, other = member(1), member(2)
    join(plan, one, other)
    plan.asked(1, 0.0)
    assert list(plan.decide(0.0)) == [Link(one)]
    plan.made(1, one.incarnation, 0.1)
    plan.asked(2, 0.1)  # before it is said what came of the first
    assert list(plan.decide(0.1)) == [Link(other)]


def test_a_restart_of_who_is_not_linked_takes_nobodys_place() -> None:
    plan = plan_of(Wants(max_links=1))
    join(plan, member(1))
    made(plan, member(1), 0.0)
    join(plan, member(2))
    for number in range(1, 4):
        plan.told(Changes(changed=(Change(member(2, number), member(2, number + 1)),)), 1.0)
        assert [type(each) for each in plan.decide(1.0)] == [Cut]


def test_clusters_choose_others_where_not_all_can_be_linked() -> None:
    everybody = [member(cluster_id) for cluster_id in range(20)]
    choices = set[int]()
    for us in range(100, 110):
        plan = Plan(us, Wants(max_links=2), FACTS, lambda: 0.5)
        choices.update(action.record.cluster_id for action in join(plan, *everybody))  # type: ignore[attr-defined]
    assert len(choices) > 8


def test_who_is_asked_for_gets_the_place_of_who_was_not_for_long() -> None:
    plan = plan_of(Wants(at_once=False, max_links=2))
    everybody = [member(cluster_id) for cluster_id in (1, 2, 3)]
    join(plan, *everybody)
    for now, each in enumerate(everybody[:2]):
        plan.asked(each.cluster_id, now)
        assert list(plan.decide(now)) == [Link(each)]
        made(plan, each, now)
    plan.asked(1, 5.0)
    plan.asked(3, 6.0)
    assert list(plan.decide(6.0)) == [MakeRoom(everybody[2])]
    assert plan.yielding() == [everybody[1], everybody[0]]
    plan.asked(3, 6.1)
    assert list(plan.decide(6.1)) == []  # it is being made
    plan.ended(2, everybody[1].incarnation, 6.2)
    plan.made_room(everybody[2])
    assert list(plan.decide(6.2)) == [Link(everybody[2])]


def test_who_is_asked_for_again_gets_room_when_all_were_in_use_before() -> None:
    plan = plan_of(Wants(at_once=False, max_links=1))
    one, other = member(1), member(2)
    join(plan, one, other)
    plan.asked(1, 0.0)
    list(plan.decide(0.0))
    made(plan, one, 0.0)
    for now in (1.0, 2.0):
        plan.asked(2, now)
        assert list(plan.decide(now)) == [MakeRoom(other)]
        plan.made_room(other)  # but nobody could go


def test_who_waits_for_a_place_in_vain_is_kept_once() -> None:
    """A fleet is larger than a member may link to; others say something new, come and go."""
    plan = plan_of(Wants(max_links=1))
    join(plan, member(0))
    made(plan, member(0), 0.0)
    for step in range(3000):
        before, now = member(1, labels={"load": str(step)}), member(1, labels={"load": "-"})
        join(plan, before, member(100 + step, step))
        plan.told(Changes(changed=(Change(before, now),)), 0.0)
        list(plan.decide(0.0))
        plan.told(Changes(left=(now, member(100 + step, step))), 0.0)
    assert len(plan._ready) + len(plan._pausing) < 300


def test_only_so_many_links_are_made_at_a_time() -> None:
    plan = plan_of()
    everybody = [member(cluster_id) for cluster_id in range(3 * MOST_AT_ONCE)]
    under_way = join(plan, *everybody)
    assert len(under_way) == MOST_AT_ONCE
    for action in under_way:
        assert isinstance(action, Link)
        plan.tried(action.record, "nobody listens", 0.0)
    assert len(list(plan.decide(0.0))) == MOST_AT_ONCE


def test_while_it_is_paused_nobody_is_linked() -> None:
    plan, one = plan_of(), member()
    plan.is_paused = True
    assert join(plan, one) == []
    assert plan.next_at is None
    plan.is_paused = False
    assert list(plan.decide(1.0)) == [Link(one)]


def test_without_wants_the_fleet_is_only_looked_at() -> None:
    plan = Plan(US, None, {}, lambda: 0.5)
    assert join(plan, member()) == []
    plan.asked(1, 0.0)
    assert list(plan.decide(0.0)) == []
    plan.made(1, member().incarnation, 0.0)  # it has linked to us
    assert plan.members[1].state == "linked"
    plan.told(Changes(left=(member(),)), 1.0)
    assert [type(action) for action in plan.decide(1.0)] == [Leave]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"roles": ["PROMPT"]}, TypeError),
        ({"labels": {"a": 1}}, TypeError),
        ({"at_once": 1}, TypeError),
        ({"max_links": 0}, ValueError),
        ({"max_links": True}, TypeError),
    ],
)
def test_wants_that_cannot_be(wrong: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        Wants(**wrong)  # type: ignore[arg-type]
