"""The fleet under load: its processes and its directory, and what is done to them."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from fleet.worker import Setting, Worker
from llm_datadist import LLMRole
from llm_datadist.testing.cluster import free_port
from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.process import ObjectProcess

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

    from typing_extensions import Self

    from directory.etcd_server import EtcdServer

TTL_S = 3.0
PREFILLS, DECODES = (1, 2, 3, 4), (11, 12, 13, 14)
#: these are reached by TCP alone, through a network that can be cut
BEHIND_A_NETWORK = (3, 4, 13, 14)


class Event(NamedTuple):
    """What was done, to whom, and from when to when it may be noticed by others."""

    kind: str
    subject: int  #: a cluster id; 0: the directory
    began: float
    ended: float  #: all is as it should be again
    tag: str = ""  #: of the start that replaced it, if one did


class Seat:
    """A place in the fleet, and the process that has it now."""

    def __init__(self, cluster_id: int, directory: str, notes: Path) -> None:
        self.cluster_id = cluster_id
        self._role = LLMRole.PROMPT if cluster_id in PREFILLS else LLMRole.DECODER
        self._directory, self._notes = directory, notes
        self._port = free_port()
        self._proxy: FaultProxy | None = None
        self._starts = 0
        self._process: ObjectProcess[Worker] | None = None

    def start(self, *, elsewhere: bool = False) -> tuple[str, float]:
        """A new process; its tag, and when it was ready."""
        if elsewhere:
            self._port = free_port()
        is_far = self.cluster_id in BEHIND_A_NETWORK
        if is_far and (elsewhere or self._proxy is None):
            self._close_proxy()
            self._proxy = FaultProxy(self._port)
        self._starts += 1
        setting = Setting(
            self.cluster_id,
            self._role,
            self._port,
            "" if self._proxy is None else f"127.0.0.1:{self._proxy.port}",
            "tcp" if is_far else "auto",
            self._directory,
            TTL_S,
            self._notes / f"{self.cluster_id}-{self._starts}",
        )
        self._process = ObjectProcess(Worker, setting)
        return self._process.call(Worker.when)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
        self._close_proxy()

    def restart(self, rng: random.Random, *, elsewhere: bool) -> tuple[str, float]:
        """Killed, and started again a moment later."""
        assert self._process is not None
        self._process.kill()
        time.sleep(rng.choice((0.0, 0.5, 1.5)))
        return self.start(elsewhere=elsewhere)

    def stand_still(self, rng: random.Random) -> None:
        assert self._process is not None
        self._process.pause()
        time.sleep(rng.choice((0.2, 1.0, TTL_S * 1.5)))
        self._process.resume()

    def lose_network(self, rng: random.Random) -> None:
        assert self._proxy is not None
        self._proxy.cut()
        time.sleep(rng.choice((0.1, 0.5, 2.0)))
        self._proxy.restore()

    def switch_there_and_back(self, rng: random.Random) -> None:
        assert self._process is not None
        other = LLMRole.DECODER if self._role is LLMRole.PROMPT else LLMRole.PROMPT
        for role in (other, self._role):
            self._process.call(Worker.switch, role)
            time.sleep(rng.choice((0.2, 1.0)))

    def _close_proxy(self) -> None:
        if self._proxy is not None:
            self._proxy.close()
        self._proxy = None


class Fleet:
    """4 prefills and 4 decodes. A context manager."""

    def __init__(self, folder: Path, server: EtcdServer | None) -> None:
        self._folder, self._server = folder, server
        self.notes = folder / "notes"
        self.notes.mkdir()
        self._members = folder / "members"
        self._members.mkdir()
        directory = f"folder:{self._members}"
        if server is not None:
            directory = server.url.replace("http:", "etcd:") + "/fleet"
        self.seats = {
            cluster_id: Seat(cluster_id, directory, self.notes)
            for cluster_id in (*PREFILLS, *DECODES)
        }
        self._ends = ExitStack()

    def __enter__(self) -> Self:
        for seat in self.seats.values():
            self._ends.callback(seat.close)
            seat.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ends.close()

    def kinds(self) -> dict[str, tuple[int, ...]]:
        """What can be done, and to whom."""
        everybody = (*PREFILLS, *DECODES)
        return {
            "killed, restarted on its port": everybody,
            "killed, restarted elsewhere": everybody,
            "stopped and continued": everybody,
            "its network cut": BEHIND_A_NETWORK,
            "role switched, and back": everybody,
            self._outage: (0,),
        }

    def do(self, kind: str, subject: int, rng: random.Random) -> Event:
        """Does it, and waits until it is over."""
        began = time.monotonic()
        if subject == 0:
            self._lose_directory(rng)
            return Event(kind, subject, began, time.monotonic())
        seat = self.seats[subject]
        if kind.startswith("killed"):
            tag, ended = seat.restart(rng, elsewhere=kind.endswith("elsewhere"))
            return Event(kind, subject, began, ended, tag)
        does: dict[str, Callable[[random.Random], None]] = {
            "stopped and continued": seat.stand_still,
            "its network cut": seat.lose_network,
            "role switched, and back": seat.switch_there_and_back,
        }
        does[kind](rng)
        return Event(kind, subject, began, time.monotonic())

    @property
    def _outage(self) -> str:
        return "folder gone, and back" if self._server is None else "etcd killed, and back"

    def _lose_directory(self, rng: random.Random) -> None:
        pause_s = rng.choice((0.1, 1.0, TTL_S * 1.5))
        if self._server is None:
            aside = self._folder / "aside"
            self._members.rename(aside)
            time.sleep(pause_s)
            aside.rename(self._members)
            return
        self._server.kill()
        if rng.random() < 0.3:
            self._server.forget()
        time.sleep(pause_s)
        self._server.start()
