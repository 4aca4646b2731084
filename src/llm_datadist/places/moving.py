"""Transfers on several devices: every part at once, under one deadline, with one outcome."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

from llm_datadist.core.transfer import Copy, Place, Pull, Push
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.observe.log import get_logger
from llm_datadist.places.catalogs import named
from llm_datadist.running.deadline import Deadline, Token
from llm_datadist.transfers.transfers import Part

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from llm_datadist.cluster import Cluster
    from llm_datadist.core.shards import PullShards
    from llm_datadist.observe.watch import Watch
    from llm_datadist.running.movers import Call, Movers
    from llm_datadist.running.threads import Errands

#: a key that leads from one cache to another in the middle of a call is followed so many times
_ATTEMPTS: Final = 10


class Moving:
    """The Transfers of several devices, as one. Thread-safe.

    A call is carried to all devices side by side (`Movers`: nothing of it is running when it has
    returned or raised), and succeeds when each part has. A part that fails keeps those that have
    not begun from beginning; what the others moved meanwhile is worth nothing. Each part finds the
    peer's cache by itself, and they have found the same one, or all is moved anew. The owner of a
    key is told of a pull only when all parts have arrived, once for all devices.
    """

    def __init__(self, places: Sequence[Cluster], timeout_s: float, movers: Movers) -> None:
        self._places = places
        self._timeout_s = timeout_s
        self._movers = movers

    @property
    def errands(self) -> Errands:
        """Starts threads where no signal strikes."""
        return self._places[0].transfers.errands

    def watching(self, operation: str) -> AbstractContextManager[Watch | None]:
        """Watches an operation on all devices; each part is watched by its own place."""
        return self._places[0].transfers.watching(operation)

    def run(self, asked: Pull | Push | Copy | PullShards) -> None:
        """Moves what is asked on every device, within the cluster's time-out.

        Raises LLMException, which names the first device that failed; nothing arrives after it was
        raised.
        """
        if isinstance(asked, Pull | Push) and not self._is_of_ourselves(asked):
            self._require_links(asked.place.cluster_id)
        each = [self._of_device(asked, device) for device in range(len(self._places))]

        def run(device: int, part: Part) -> None:
            self._places[device].transfers.run(each[device], part)

        deadline = self._deadline()
        for _ in range(_ATTEMPTS):
            parts = self._run(run, deadline)
            if not isinstance(asked, Pull | Push) or _are_of_one_cache(parts):
                break
            self._forget(asked.place.cluster_id)
        else:
            raise LLMException(
                f"{asked}: on some devices the key led to another cache than on others, "
                f"{_ATTEMPTS} times: its owner moves it from one to the next meanwhile",
                LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
            )
        self._confirm(parts, deadline)

    def push_to_addresses(self, asked: Push, tensors: range, addrs: Sequence[int]) -> None:
        """As `Transfers.push_to_addresses`; `addrs` has as many of each device, in their order."""
        count = len(addrs) // len(self._places)
        self._require_links(asked.place.cluster_id)

        def push(device: int, part: Part) -> None:
            ours = addrs[device * count : (device + 1) * count]
            self._places[device].transfers.push_to_addresses(asked, tensors, ours, part)

        self._run(push, self._deadline())

    def _deadline(self) -> Deadline:
        """Of a call that begins now, with a token that cuts all of its parts."""
        return Deadline.after(self._timeout_s, Token(()))

    def _run(self, do: Callable[[int, Part], None], deadline: Deadline) -> list[Part]:
        parts = [Part(deadline, [], []) for _ in self._places]

        def task(device: int, call: Call) -> None:
            call.require()  # another may have failed meanwhile
            with named(device):
                do(device, parts[device])

        self._movers.run([partial(task, device) for device in range(len(parts))], deadline.token)
        return parts

    def _confirm(self, parts: Sequence[Part], deadline: Deadline) -> None:
        """The bytes have been moved, which is what was asked for; their key has done its duty.

        The owner is told on one device, and lets go of the key on all (`Catalog.use_up`): a receipt
        for each could come on some alone. One that cannot be told keeps the key on all, and the log
        says so.
        """
        for device, part in enumerate(parts):
            for receipt in part.receipts:
                try:
                    self._places[device].transfers.run(receipt, Part(deadline, [], []))
                except LLMException as error:
                    get_logger().warning("an owner does not know what was pulled of it: %s", error)
                return

    def _is_of_ourselves(self, asked: Pull | Push) -> bool:
        """A pull that each device refuses, and says why."""
        return isinstance(asked, Pull) and self._places[0].links.is_self(asked.place.cluster_id)

    def _require_links(self, cluster_id: int) -> None:
        """Before anything moves. Raises LLMException(LLM_NOT_YET_LINK)."""
        for device, place in enumerate(self._places):
            with named(device):
                place.links.find(cluster_id)

    def _forget(self, cluster_id: int) -> None:
        """What was known of the peer's caches; each device asks anew. Raises as `Links.find`."""
        for device, place in enumerate(self._places):
            with named(device):
                place.links.find(cluster_id).forget()

    def _of_device(
        self, asked: Pull | Push | Copy | PullShards, device: int
    ) -> Pull | Push | Copy | PullShards:
        """The part of one device. All are alike but for memory that is known by address alone."""
        if not isinstance(asked, Copy):
            return asked
        if isinstance(asked.src, int) and isinstance(asked.dst, int):
            return asked
        src, dst = (self._place_of(each, device) for each in (asked.src, asked.dst))
        return replace(asked, src=src, dst=dst)

    def _place_of(self, cache: int | Place, device: int) -> int | Place:
        if isinstance(cache, int):
            return cache
        total, devices = cache.layout.geometry.num_tensors, len(self._places)
        if total % devices:
            raise invalid(f"a CPU cache of {total} tensors cannot be shared by {devices} devices")
        count = total // devices
        return Place(cache.layout.tensors(range(device * count, (device + 1) * count)), cache.space)


def _are_of_one_cache(parts: Sequence[Part]) -> bool:
    """A cache has one id on all devices, which no other cache of that process ever has."""
    return len({cache for part in parts for cache in part.moved}) == 1
