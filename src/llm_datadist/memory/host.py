"""Process memory: which of its addresses are mapped."""

from __future__ import annotations

import bisect
from pathlib import Path
from typing import TYPE_CHECKING

from llm_datadist.observe.log import get_logger
from llm_datadist.system_errors import pass_on_handlers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_MAPS = Path("/proc/self/maps")


def unmapped(addrs: Iterable[int], nbytes: int) -> list[int]:
    """Those of the addresses behind which not all of `nbytes` are mapped at this moment.

    None, where the system does not tell: it may be out of descriptors.
    """
    try:
        ranges = _mapped_ranges(_MAPS.read_text())
    except OSError as error:
        pass_on_handlers(error)
        return []
    return [addr for addr in addrs if not _lies_within(ranges, addr, addr + nbytes)]


def warn_of_strays(addrs: Sequence[int], nbytes: int, held: Sequence[object | None]) -> None:
    """Says which tensors to be registered are not mapped, of those that nothing keeps.

    What is kept is there, and to look takes milliseconds in a process that has torch.
    """
    keepers = held or [None] * len(addrs)
    loose = [addr for addr, keeper in zip(addrs, keepers, strict=True) if keeper is None]
    strays = unmapped(loose, nbytes) if loose else []
    if strays:
        get_logger().warning(
            "register: no memory is mapped at %d of %d addresses, the first is %#x (+%d bytes); "
            "transfers that use it will fail",
            len(strays), len(addrs), strays[0], nbytes,
        )  # fmt: skip


def _mapped_ranges(maps: str) -> list[tuple[int, int]]:
    """Readable address ranges in ascending order, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for line in maps.splitlines():
        span, access = line.split(maxsplit=2)[:2]
        start, stop = (int(part, 16) for part in span.split("-"))
        if not access.startswith("r"):
            continue
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
    return ranges


def _lies_within(ranges: list[tuple[int, int]], start: int, stop: int) -> bool:
    index = bisect.bisect_right(ranges, (start, 2**64)) - 1
    return index >= 0 and stop <= ranges[index][1]
