"""The fleet under load: its processes and its directory, and what is done to them."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from fleet.rivals import MEMBERS
from fleet.worker import Load, Setting, Worker
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
#: these are reached by TCP alone, through a network that can be cut; where the library can do that
BEHIND_A_NETWORK = (3, 4, 13, 14)
OURS = "llm-datadist"


class Event(NamedTuple):
    """What was done, to whom, and from when to when it may be noticed by others."""

    kind: str
    subject: int  #: a cluster id; 0: the directory
    began: float
    ended: float  #: all is as it should be again
    tag: str = ""  #: of the start that replaced it, if one did


class Seat:
    """A place in the fleet, and the process that has it now."""

    def __init__(self, cluster_id: int, directory: str, notes: Path, library: str) -> None:
        self.cluster_id = cluster_id
        self._make: type[Load] = MEMBERS.get(library, Worker)
        self._is_far = cluster_id in BEHIND_A_NETWORK and library == OURS
        self._role = LLMRole.PROMPT if cluster_id in PREFILLS else LLMRole.DECODER
        self._directory, self._notes = directory, notes
        self._port = free_port()
        self._proxy: FaultProxy | None = None
        self._starts = 0
        self._process: ObjectProcess[Load] | None = None

    @property
    def has_crashed(self) -> bool:
        """Whether the process has ended, and nobody has killed it."""
        return self._process is not None and self._process.exit_code is not None

    def start(self, *, elsewhere: bool = False) -> tuple[str, float]:
        """A new process; its tag, and when it was ready."""
        if elsewhere:
            self._port = free_port()
        if self._is_far and (elsewhere or self._proxy is None):
            self._close_proxy()
            self._proxy = FaultProxy(self._port)
        self._starts += 1
        setting = Setting(
            self.cluster_id,
            self._role,
            self._port,
            "" if self._proxy is None else f"127.0.0.1:{self._proxy.port}",
            "tcp" if self._is_far else "auto",
            self._directory,
            TTL_S,
            self._notes / f"{self.cluster_id}-{self._starts}",
        )
        self._process = ObjectProcess(self._make, setting)
        return self._process.call(Load.when)

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
            self._process.call(self._make.switch, role)
            time.sleep(rng.choice((0.2, 1.0)))

    def _close_proxy(self) -> None:
        if self._proxy is not None:
            self._proxy.close()
        self._proxy = None


class Fleet:
    """4 prefills and 4 decodes. A context manager."""

    def __init__(self, folder: Path, server: EtcdServer | None, library: str = OURS) -> None:
        self._folder, self._server, self._library = folder, server, library
        #: processes that ended by themselves
        self.crashes = 0
        self.notes = folder / "notes"
        self.notes.mkdir()
        self._members = folder / "members"
        self._members.mkdir()
        directory = f"folder:{self._members}"
        if server is not None:
            directory = server.url.replace("http:", "etcd:") + "/fleet"
        self.seats = {
            cluster_id: Seat(cluster_id, directory, self.notes, library)
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
        kinds = {
            "killed, restarted on its port": everybody,
            "killed, restarted elsewhere": everybody,
            "stopped and continued": everybody,
            "its network cut": BEHIND_A_NETWORK,
            "role switched, and back": everybody,
            self._outage: (0,),
        }
        if self._library != OURS:  # they take ports, and ways to each other, as they like
            del kinds["killed, restarted on its port"], kinds["its network cut"]
        return kinds

    def do(self, kind: str, subject: int, rng: random.Random) -> Event:
        """Does it, and waits until it is over."""
        began = time.monotonic()
        if subject == 0:
            self._lose_directory(rng)
            return Event(kind, subject, began, time.monotonic())
        seat = self.seats[subject]
        try:
            return self._do_to(seat, kind, rng)
        except (EOFError, ProcessLookupError):  # it has crashed meanwhile
            if not seat.has_crashed:
                raise
        return self._revive(seat, kind, began)

    def _do_to(self, seat: Seat, kind: str, rng: random.Random) -> Event:
        began = time.monotonic()
        if seat.has_crashed:
            return self._revive(seat, kind, began)
        subject = seat.cluster_id
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

    def _revive(self, seat: Seat, kind: str, began: float) -> Event:
        self.crashes += 1
        tag, ended = seat.start()
        return Event(kind, seat.cluster_id, began, ended, tag)

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
