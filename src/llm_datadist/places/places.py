"""Places: a cluster of several devices. Seed 002; spec 7.1, Appendix C; decision D30.

Each device is a place of its own, which is what a cluster of one device is: a listener, pools, a
gate, links to the same device of peers. Here is what acts on all of them as on one: every verb is
carried to all places side by side, under one deadline, and comes back as one outcome. A cache has
one id and as many tensors on every device; its addresses are those of the first device, then those
of the second, and so on. Nothing of this is on the way of a cluster with one device.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from llm_datadist.cluster import Cluster
from llm_datadist.device_options import unequal
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.links.linker import Outcome
from llm_datadist.places.catalogs import Catalogs
from llm_datadist.places.figures import together
from llm_datadist.places.linking import Bundles, Links
from llm_datadist.places.moving import Moving
from llm_datadist.running.deadline import Deadline
from llm_datadist.running.movers import Movers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from llm_datadist.core.stats import ClusterStats
    from llm_datadist.endpoint import Endpoint
    from llm_datadist.links.filing import Siblings
    from llm_datadist.links.linker import Target
    from llm_datadist.options import Options

    MakeCluster: TypeAlias = Callable[[int, Options, Siblings | None], Cluster]
    #: what a program has initialised
    AnyCluster: TypeAlias = "Cluster | Places"

T = TypeVar("T")

#: so many calls at a time have a thread for each device
_CALLS: Final = 8
#: how long their threads may take to end, when all else has
_HELPERS_S: Final = 1.0


class Places:
    """The places of a process's devices. Thread-safe, but for `start` and `stop`.

    Raises as Cluster does; nothing is left behind then.
    """

    def __init__(self, cluster_id: int, options: Options, make: MakeCluster = Cluster) -> None:
        self.cluster_id = cluster_id
        self.options = options
        self._places: list[Cluster] = []
        self._movers: Movers | None = None
        self._bundles = bundles = Bundles(self._places, options.sync_timeout_s)
        try:
            for each in options.of_each_device():
                self._places.append(make(cluster_id, each, bundles))
        except BaseException:
            self.stop()
            raise
        places = self._places
        for place in places:
            place.gates = [each.gate for each in places]
            place.catalog.siblings = [each.catalog for each in places]
        self._errands = errands = places[0].transfers.errands
        self._movers = Movers(_CALLS * len(places), errands)
        #: our caches
        self.catalog = Catalogs([place.catalog for place in places], errands)
        #: our live links
        self.links = Links(places)
        #: what moves bytes
        self.transfers = Moving(places, options.sync_timeout_s, self._movers)

    def start(self) -> None:
        """Listens on each device, if the options say where. `stop` must follow, as of Cluster."""
        for place in self._places:
            place.start()

    @property
    def is_up(self) -> bool:
        """Whether all have started, and nobody has begun to end them."""
        return all(place.is_up for place in self._places)

    def stop(self) -> None:
        """Ends all places at once, each as `Cluster.stop` does; their calls drain together."""
        begun: list[Cluster] = []
        failed: LLMException | None = None
        for place in self._places:
            try:
                if place.begins_to_stop():
                    begun.append(place)
            except LLMException as error:  # no thread is to be had; the others end
                failed = error
        can_wait = len(begun) == len(self._places)  # else a call of this thread is in the way
        for place in begun if can_wait else ():
            place.await_stop()
        if self._movers is not None:
            with suppress(LLMException):  # they are daemons, and end by themselves
                self._movers.end(Deadline.after(_HELPERS_S if can_wait else 0.0))
        if failed is not None:
            raise failed

    def make(self, make: Callable[[], T], id_of: Callable[[T], int]) -> T:
        """As `Cluster.make`."""
        return self._errands.run(make, lambda made: self.catalog.forget(id_of(made)))

    def link(self, targets: Sequence[Target], timeout_s: float) -> list[Outcome]:
        """Links device i to device i of each target, all devices or none. Spec 5.4."""
        if self.options.cannot_link:
            refused = Outcome(LLMStatusCode.LLM_PARAM_INVALID, self.options.cannot_link)
            return [refused for _ in targets]
        with self.transfers.watching("link") as watch:
            outcomes = self._bundles.link(targets, timeout_s)
            if watch is not None:
                watch.ended([outcome.status for outcome in outcomes])
            return outcomes

    def unlink(self, targets: Sequence[Target], timeout_s: float, *, force: bool) -> list[Outcome]:
        """Unlinks all devices from each target. Spec 5.5."""
        with self.transfers.watching("unlink") as watch:
            outcomes = self._bundles.unlink(targets, timeout_s, force=force)
            if watch is not None:
                watch.ended([outcome.status for outcome in outcomes])
            return outcomes

    def switching(self) -> AbstractContextManager[None]:
        """The turn to change the role, as `Cluster.switching`."""
        return self._places[0].switching()

    def switch_listening(self, endpoints: Sequence[Endpoint]) -> None:
        """Each device listens at its address, or none does any more. Raises LLMException."""
        count = len(self._places)
        if endpoints and len(endpoints) != count:
            raise unequal(count, len(endpoints))
        self._errands.run(lambda: self._switch(endpoints or [None] * count))

    def _switch(self, endpoints: Sequence[Endpoint | None]) -> None:
        before = [(each.listening.asked, each.listening.endpoint) for each in self._places]
        moved: list[Cluster] = []
        try:
            for place, endpoint in zip(self._places, endpoints, strict=True):
                place.listening.switch(endpoint, place.options)
                moved.append(place)
        except BaseException:
            for place, was in zip(moved, before, strict=False):
                place.listening.put_back(*was)
            raise

    def stats(self) -> ClusterStats:
        """What there is on all devices, and what was counted so far."""
        return together([place.stats() for place in self._places])

    def call_soon(self, call: Callable[[], object]) -> None:
        """As `Cluster.call_soon`."""
        self._places[0].call_soon(call)

    @property
    def listen_endpoints(self) -> tuple[Endpoint, ...]:
        """Where each device listens, in their order; none if they do not."""
        return tuple(each for place in self._places for each in place.listen_endpoints)


def open_cluster(
    cluster_id: int, options: Options, make: MakeCluster = Cluster
) -> Cluster | Places:
    """What the options ask for: a cluster of one device, or the places of several."""
    if options.devices:
        return Places(cluster_id, options, make)
    return make(cluster_id, options, None)
