"""Strangers: connections of which nothing is known yet, bounded so that they cost links nothing.

Three crowds: who has said nothing of use yet, who asks for stats, and who has said Hello and is not
linked yet. Each has a bound for one origin and one in all. Whoever comes beyond a bound is let in,
and in its place the one goes that has been there longest, of the origin that has the most: so one
that speaks at once is served, however many say nothing, and a stream of a link that exists is in no
crowd as soon as it has shown its token. When descriptors run out the largest crowd makes room, too.

Who is turned away is counted, and the log says so once a minute. All belongs to the loop's thread,
but for the counts, which may be read in any.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from llm_datadist.endpoint import Endpoint
from llm_datadist.observe.log import get_logger

if TYPE_CHECKING:
    from llm_datadist.links.control import Control

#: who says nothing: of one origin, and in all
_MAX_SILENT = 256, 512
#: who is shaking hands; each may keep one of the waiters' threads, of which there are twice as many
_MAX_HALF_OPEN = 128, 256
#: one that is not linked has stayed too long by then, whatever it asked for; to verify a path takes
#: seconds on a busy machine (NIXL starts an agent at each end), so what bounds them is how many may
HAND_SHAKE_S = 60.0
#: so long nobody has to make room when descriptors run out: to say something, to shake hands
_FRESH_S = 0.05
_SHAKING_S = 0.1
_REPORT_S = 60.0


class Turned(NamedTuple):
    """What became of those who were not served."""

    silent: str = "said nothing of use in time"
    crowded: str = "said nothing yet when others came"
    asking: str = "did not take an answer when others came"
    half_open: str = "shook hands too long when others came"
    late: str = "did not end the hand-shake in time"
    broken: str = "broke the hand-shake off"
    another: str = "came with an id that is not theirs"
    unwelcome: str = "did not prove that they may link"
    useless: str = "said nothing of use"


WHY = Turned()
#: the others are everyday business: port scanners, health checks
_REMARKABLE = frozenset({WHY.crowded, WHY.asking, WHY.half_open, WHY.another})


class _Crowd:
    """Connections, by where they come from."""

    def __init__(self, most_of_one: int, most: int) -> None:
        self._most_of_one = most_of_one
        self._most = most
        #: of each origin, in the order in which they came, and when
        self._by_origin: dict[object, dict[Control, float]] = {}
        self.count = 0

    def add(self, control: Control) -> Control | None:
        """Whom to turn away for it, if anybody."""
        own = self._by_origin.setdefault(origin_of(control), {})
        own[control] = time.monotonic()
        self.count += 1
        if len(own) > self._most_of_one:
            return next(iter(own))
        return self.oldest_of_most() if self.count > self._most else None

    def discard(self, control: Control) -> bool:
        """Whether it was here."""
        origin = origin_of(control)
        own = self._by_origin.get(origin, {})
        if control not in own:
            return False
        del own[control]
        if not own:
            del self._by_origin[origin]
        self.count -= 1
        return True

    def oldest_of_most(self, fresh_s: float = 0.0) -> Control | None:
        """The one that was first of the origin that has the most, unless it has just come."""
        most = max(self._by_origin.values(), key=len, default=None)
        if most is None:
            return None
        control, came_at = next(iter(most.items()))
        return control if came_at <= time.monotonic() - fresh_s else None


class Strangers:
    """Those of a cluster, at all of its listeners."""

    def __init__(self) -> None:
        self._silent = _Crowd(*_MAX_SILENT)
        self._asking = _Crowd(*_MAX_SILENT)
        self._half_open = _Crowd(*_MAX_HALF_OPEN)
        self.num_turned_away = 0
        self._untold: Counter[str] = Counter()
        #: of what was not said yet, the first case in other words
        self._examples: dict[str, str] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def num_silent(self) -> int:
        """Connections that have said nothing of use yet."""
        return self._silent.count

    @property
    def num_half_open(self) -> int:
        """Hand-shakes that are under way with whoever called."""
        return self._half_open.count

    def came(self, control: Control) -> None:
        """A connection was accepted; `known` must follow."""
        self._evict(self._silent, self._silent.add(control), WHY.crowded)

    def asks(self, control: Control) -> None:
        """It wants no more than an answer; `known` must follow."""
        self.known(control)
        self._evict(self._asking, self._asking.add(control), WHY.asking)

    def said_hello(self, control: Control) -> None:
        """It would link; `known` must follow."""
        self.known(control)
        self._evict(self._half_open, self._half_open.add(control), WHY.half_open)

    def known(self, control: Control) -> bool:
        """It is a stranger's no more, or has ended; whether it was one. May be called again."""
        crowds = self._silent, self._asking, self._half_open
        return any(crowd.discard(control) for crowd in crowds)

    def make_room(self) -> bool:
        """Half of the largest crowd goes, but for those who have just come; False without any."""
        crowd, why, fresh_s = max(
            (self._silent, WHY.crowded, _FRESH_S),
            (self._asking, WHY.asking, _FRESH_S),
            (self._half_open, WHY.half_open, _SHAKING_S),
            key=lambda each: each[0].count,
        )
        for _ in range((crowd.count + 1) // 2):
            self._evict(crowd, crowd.oldest_of_most(fresh_s), why)
        return crowd.count > 0

    def turned_away(self, why: str, example: str = "") -> None:
        """Counts it, and says so: now, or when a minute is over."""
        self.num_turned_away += 1
        self._untold[why] += 1
        if example:
            self._examples.setdefault(why, example)
        if self._timer is None:
            self._tell()

    def close(self) -> None:
        """Says what was not said yet."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._say()

    def _evict(self, crowd: _Crowd, control: Control | None, why: str) -> None:
        if control is not None and crowd.discard(control):
            control.end()
            self.turned_away(why)

    def _tell(self) -> None:
        self._timer = None
        if self._untold:
            self._say()
            self._timer = asyncio.get_running_loop().call_later(_REPORT_S, self._tell)

    def _say(self) -> None:
        untold, self._untold = self._untold, Counter()
        examples, self._examples = self._examples, {}
        if untold:
            logger = get_logger()
            say = logger.info if _REMARKABLE.isdisjoint(untold) else logger.warning
            say(
                "turned away %d connections that are no link's: %s", untold.total(),
                "; ".join(
                    f"{count} {why}" + (f", as: {examples[why]}" if why in examples else "")
                    for why, count in untold.items()
                ),
            )  # fmt: skip


def origin_of(control: Control) -> object:
    """What strangers cannot have many of: a process of this host, an address, a network of IPv6."""
    if control.process is not None:
        return control.process.pid
    if not isinstance(control.at, Endpoint):
        return None
    address = ipaddress.ip_address(control.at.host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or int(address) >> 64
    return address
