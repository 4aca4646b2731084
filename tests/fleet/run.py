"""Events at random times, several under way at once, each to a member that has none."""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from fleet.stage import Event, Fleet

#: of 8 members: the others are those who must notice nothing
AT_ONCE = 3
#: what members have to find each other at first, and at last
SETTLE_S = 6.0


class Played(NamedTuple):
    """What was done, and since when the fleet was complete."""

    began: float
    events: list[Event]


def play(
    fleet: Fleet, seconds: float, num_events: int, seed: int, on_event: Callable[[int], object]
) -> Played:
    """All events, when they are over. Raises what an event raised."""
    rng = random.Random(seed)
    kinds = fleet.kinds()
    time.sleep(SETTLE_S)
    begun = time.monotonic()
    events: list[Event] = []
    errors: list[BaseException] = []
    busy: set[int] = set()
    free = threading.Condition()

    def run(kind: str, subject: int, seed: int) -> None:
        try:
            event = fleet.do(kind, subject, random.Random(seed))
            with free:
                events.append(event)
        except BaseException as error:
            errors.append(error)
        finally:
            with free:
                busy.discard(subject)
                free.notify_all()

    threads = []
    for number in range(num_events):
        due = begun + seconds * number / num_events
        time.sleep(max(0.0, due - time.monotonic()))
        with free:
            free.wait_for(lambda: len(busy) < AT_ONCE)
            if errors or time.monotonic() > begun + 2 * seconds:
                break
            choices = [
                (kind, each) for kind, all_ in kinds.items() for each in all_ if each not in busy
            ]
            kind = rng.choice(sorted({kind for kind, _ in choices}))
            subject = rng.choice([each for name, each in choices if name == kind])
            busy.add(subject)
        thread = threading.Thread(target=run, args=(kind, subject, rng.getrandbits(32)))
        thread.start()
        threads.append(thread)
        on_event(number + 1)
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    time.sleep(SETTLE_S)
    return Played(begun, events)
