"""The caches of several devices: each is one cache, with one id and a part on every device."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llm_datadist.core.geometry import Layout
from llm_datadist.errors import LLMException, invalid
from llm_datadist.locks import make_lock
from llm_datadist.running.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy.typing as npt

    from llm_datadist.core.geometry import Geometry
    from llm_datadist.core.pages import PoolUsage
    from llm_datadist.core.registry import Entry, KeyName
    from llm_datadist.kv_layout import KVLayout
    from llm_datadist.memory.arena import MemoryPool
    from llm_datadist.owner.catalog import Catalog
    from llm_datadist.running.threads import Errands
    from llm_datadist.types import Placement


class Filed(NamedTuple):
    """A cache on several devices."""

    cache_id: int
    layout: Layout  #: of all devices, those of the first one first


class Catalogs:
    """The catalogs of several devices, as one. Thread-safe.

    A cache is filed on all devices or on none, under an id that is given here: peers name it by
    that, on whichever device. Of changes in several steps none is left half done (`Errands`).
    """

    def __init__(self, catalogs: Sequence[Catalog], errands: Errands) -> None:
        self._catalogs = catalogs
        self._errands = errands
        self._lock = make_lock()
        self._last_id = 0

    @property
    def pools(self) -> Mapping[Placement, MemoryPool]:
        """The first device's, of each placement that every device has."""
        first, *others = (catalog.pools for catalog in self._catalogs)
        return {at: pool for at, pool in first.items() if all(at in other for other in others)}

    def register(
        self,
        geometry: Geometry,
        addrs: Sequence[int],
        placement: Placement,
        *,
        is_remote_accessible: bool,
    ) -> Filed:
        """As `Catalog.register`; `addrs` has those of the first device first, and so on."""
        each = geometry.num_tensors
        if len(addrs) != each * len(self._catalogs):
            raise invalid(
                f"{len(addrs)} addresses for {each} tensors on each of {len(self._catalogs)} "
                "devices: give those of the first device first"
            )

        def register(catalog: Catalog, device: int, cache_id: int) -> Entry:
            part = addrs[device * each : (device + 1) * each]
            return catalog.register(
                geometry, part, placement,
                is_remote_accessible=is_remote_accessible, cache_id=cache_id,
            )  # fmt: skip

        return self._file(register)

    def allocate(
        self,
        geometry: Geometry,
        placement: Placement,
        keys: Sequence[KeyName | None],
        kv_layout: KVLayout | None = None,
    ) -> Filed:
        """As `Catalog.allocate`, on all devices, or on none."""

        def allocate(catalog: Catalog, device: int, cache_id: int) -> Entry:
            return catalog.allocate(geometry, placement, keys, kv_layout, cache_id)

        return self._file(allocate)

    def _file(self, make: Callable[[Catalog, int, int], Entry]) -> Filed:
        with self._lock:
            self._last_id = cache_id = self._last_id + 1

        def file() -> Filed:
            layouts: list[Layout] = []
            try:
                for device, catalog in enumerate(self._catalogs):
                    with named(device):
                        layouts.append(make(catalog, device, cache_id).layout)
            except BaseException:
                self.forget(cache_id)
                with self._lock:  # a failure uses up no id, unless a peer may have seen it
                    self._last_id -= self._last_id == cache_id and not layouts
                raise
            return Filed(cache_id, _joined(layouts))

        return self._errands.run(file, lambda filed: self.forget(filed.cache_id))

    def forget(self, cache_id: int) -> None:
        """As `Catalog.forget`."""
        for catalog in self._catalogs:
            catalog.forget(cache_id)

    def unregister(self, cache_id: int, timeout_s: float) -> None:
        """As `Catalog.unregister`: all devices forget the cache, or it stays on all."""
        deadline = Deadline.after(timeout_s)
        leaves = [object() for _ in self._catalogs]
        tables = [catalog.leaving for catalog in self._catalogs]
        try:
            pairs = zip(self._catalogs, leaves, strict=True)
            entries = [catalog.begin_to_leave(cache_id, leave) for catalog, leave in pairs]
            for catalog, entry in zip(self._catalogs, entries, strict=True):
                if entry is not None:
                    catalog.await_uses(entry, max(0.0, deadline.remaining_s()))
            if any(entries):
                self._errands.run(lambda: self.forget(cache_id))
        finally:  # one step, which no signal cuts short
            list(map(dict.pop, tables, leaves, [None] * len(leaves)))

    def deallocate(self, cache_id: int) -> None:
        """As `Catalog.deallocate`."""
        self._on_each(lambda catalog: catalog.deallocate(cache_id))

    def remove_key(self, key: KeyName) -> None:
        """As `Catalog.remove_key`."""
        self._on_each(lambda catalog: catalog.remove_key(key))

    def _on_each(self, do: Callable[[Catalog], None]) -> None:
        def all_of_them() -> None:
            for catalog in self._catalogs:
                do(catalog)

        self._errands.run(all_of_them)

    def num_tensors(self, cache_id: int) -> int:
        """On each device. Raises LLM_KV_CACHE_NOT_EXIST."""
        return self._catalogs[0].num_tensors(cache_id)

    def view(self, cache_id: int, index: int) -> npt.NDArray[np.uint8]:
        """As `Catalog.view`; the tensors of the second device follow those of the first."""
        device, tensor = divmod(index, self.num_tensors(cache_id))
        return self._catalogs[device].view(cache_id, tensor)

    def usage(self) -> dict[Placement, tuple[PoolUsage, ...]]:
        """How full the pools are, those of the first device first."""
        usages = [catalog.usage() for catalog in self._catalogs]
        return {at: sum((each[at] for each in usages if at in each), ()) for at in usages[0]}


@contextmanager
def named(device: int) -> Iterator[None]:
    """Failures say on which device they are."""
    try:
        yield
    except LLMException as error:
        raise LLMException(f"device {device}: {error}", error.status_code) from error


def _joined(layouts: Sequence[Layout]) -> Layout:
    geometry = layouts[0].geometry
    count_all = geometry.num_tensors * len(layouts)
    addrs = np.concatenate([layout.addrs for layout in layouts])
    return Layout(replace(geometry, num_tensors=count_all), addrs)
