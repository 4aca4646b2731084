"""A cable between two hosts that takes its time, loses packets, and can be cut.

Each end is a TUN device in the network namespace of a process: what its host sends by it is read
here as IP packets, which are written to the other end later, or never. The kernel's netem would do
as much where it is compiled in; this needs /dev/net/tun and root.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import struct
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

from two_hosts import enter_host

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MAX_PACKET_NBYTES = 65_536


class SlowCable:
    """Joins the hosts of two processes. A context manager; both devices must be up by then.

    A thread of its own does the work. Packets stay in order.
    """

    def __init__(self, pids: Sequence[int], device: str, delay_s: float) -> None:
        """Raises OSError where TUN devices cannot be made."""
        #: one way
        self.delay_s = delay_s
        #: the share of packets that never arrive: the same ones for the same traffic
        self.loss = 0.0
        self.num_lost = self.num_passed = 0
        self._random = random.Random(7)
        self._is_cut = False
        #: when each packet is due, at which end
        self._under_way: deque[tuple[float, int, bytes]] = deque()
        with ExitStack() as opened:
            one, other = (_open_end(pid, device, opened) for pid in pids)
            self._woken, self._wake = os.pipe()
            for end in (self._woken, self._wake):
                opened.callback(os.close, end)
            self._opened = opened.pop_all()
        self._far_end = {one: other, other: one}
        self._thread = threading.Thread(target=self._run, name="slow-cable", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.write(self._wake, b"\0")
        self._thread.join()
        self._opened.close()

    def cut(self) -> None:
        """Nothing arrives any more, and nobody is told."""
        self._is_cut = True

    def _run(self) -> None:
        waiting_for = [*self._far_end, self._woken]
        while True:
            wait_s = self._under_way[0][0] - time.monotonic() if self._under_way else None
            ready = select.select(waiting_for, (), (), wait_s and max(0.0, wait_s))[0]
            if self._woken in ready:
                return
            for end in ready:
                self._take(end)
            while self._under_way and self._under_way[0][0] <= time.monotonic():
                self._pass_on()

    def _take(self, end: int) -> None:
        packet = os.read(end, _MAX_PACKET_NBYTES)
        if self._random.random() < self.loss:
            self.num_lost += 1
        else:
            self._under_way.append((time.monotonic() + self.delay_s, self._far_end[end], packet))

    def _pass_on(self) -> None:
        _, end, packet = self._under_way.popleft()
        if not self._is_cut:
            os.write(end, packet)
            self.num_passed += 1


def _open_end(pid: int, device: str, opened: ExitStack) -> int:
    """A TUN device of that name on the host of a process."""

    def open_there() -> int:
        enter_host(pid)
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        opened.callback(os.close, end)
        fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
        return end

    with ThreadPoolExecutor(1) as thread:  # which alone goes there
        return thread.submit(open_there).result()
