"""The engine at work: what one initialised Hixl has, put together.

An engine is a cluster whose id is made of its name. Its memory is caches, a connection is a link, a
READ reads over the link's path, a WRITE is fetched by its receiver under a ticket.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from llm_datadist.cluster import Cluster
from llm_datadist.errors import LLMException
from llm_datadist.hixl.connecting import Connecting
from llm_datadist.hixl.connections import Connections
from llm_datadist.hixl.memory import Memory
from llm_datadist.hixl.requests import Requests
from llm_datadist.observe.log import get_logger
from llm_datadist.running.deadline import Deadline
from llm_datadist.running.threads import is_ours
from llm_datadist.transfers.by_address import Move, NotBegun, Notice

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.core.by_address import ByAddress
    from llm_datadist.hixl.names import EngineName
    from llm_datadist.hixl.options import EngineOptions
    from llm_datadist.peer.peer import Peer
    from llm_datadist.transfers.by_address import OnLink

#: nobody times an asynchronous transfer out: as long as the system's calls can wait
_FOR_EVER_S: Final = 2_000_000.0
#: how long an asynchronous transfer may take to connect by itself
_CONNECT_S: Final = 3.0
#: a connection that ends just then is made anew so many times, where that is allowed
_ATTEMPTS: Final = 3
#: in one life there are not so many ranges and requests
_LIFE_BITS: Final = 40
#: how long the threads of an engine that has ended may take to notice
_LAST_S: Final = 2.0


class Engine:
    """One engine. Thread-safe, but for `start` and `stop`.

    Raises LLMException for what the options ask for and cannot be had, OSError.
    """

    def __init__(self, name: EngineName, options: EngineOptions, life: int = 0) -> None:
        """Of several lives of one Hixl, each has handles and numbers of requests of its own."""
        self.name = name
        self.cluster = Cluster(name.new_id(), options.cluster)
        errands = self.cluster.transfers.errands
        self.memory = Memory(self.cluster.catalog, errands, life << _LIFE_BITS)
        self.connections = Connections(self.cluster, options)
        self.requests = Requests(self._transfer_at_leisure, errands, life << _LIFE_BITS)
        self.connecting = Connecting(
            options.connect_threads,
            options.connect_queue,
            self.connections.is_connected,
            errands,
        )

    def start(self) -> None:
        """Listens, if the name says where. `stop` must follow, also when it raises."""
        self.cluster.start()

    @property
    def is_up(self) -> bool:
        return self.cluster.is_up

    def stop(self) -> None:
        """Ends everything, and waits for the calls here. Bounded, and may be called again."""
        self.requests.give_up()
        try:
            self.cluster.stop()
        except LLMException as error:
            get_logger().error("engine %s has not ended: %s", self.name, error)
        deadline = Deadline.after(0.0 if is_ours() else _LAST_S)
        for end in (self.requests.end, self.connecting.end):
            with suppress(LLMException):  # they are daemons, and end by themselves
                end(deadline)

    def disconnect(self, name: EngineName, timeout_s: float) -> None:
        """As `Connections.disconnect`; asynchronous transfers have failed when it returns.

        One that is connecting by itself just then moves nothing any more, and fails when that ends.
        """
        self.requests.give_up(name)  # first: none begins behind the look for a connection
        try:
            self.connections.disconnect(name, timeout_s)
        finally:
            if not self.connections.is_connected(name):
                self.requests.give_up(name)
                self.requests.settle(name)

    def transfer(self, name: EngineName, pieces: ByAddress, timeout_s: float) -> None:
        """Returns when all has been moved. Raises LLMException."""
        self._do(name, timeout_s, timeout_s, partial(_move, pieces))

    def notify(self, name: EngineName, notice: tuple[str, str], timeout_s: float) -> None:
        """Returns when the peer has it. Raises LLMException."""
        self._do(name, timeout_s, timeout_s, partial(_notice, notice))

    def take_notices(self) -> list[tuple[str, str]]:
        """What peers have sent and nobody has taken, in order."""
        notices = self.cluster.notices
        taken = self.cluster.transfers.errands.run(notices.take, notices.put_back)
        return [(each.name, each.text) for each in taken]

    def _transfer_at_leisure(
        self, name: EngineName, pieces: ByAddress, require: Callable[[], None]
    ) -> None:
        self._do(name, _FOR_EVER_S, _CONNECT_S, partial(_move, pieces, require=require), require)

    def _do(
        self,
        name: EngineName,
        timeout_s: float,
        connect_s: float,
        ask: Callable[[Peer, EngineName, float], OnLink],
        require: Callable[[], None] = lambda: None,
    ) -> None:
        """`require` raises when it is not wanted any more: no connection is made for it then."""
        deadline, wanted, call = Deadline.after(timeout_s), self.connections.pool.wanted, object()
        try:
            if name.port is not None:
                wanted[call] = name.endpoint
            for attempts_left in range(_ATTEMPTS - 1, -1, -1):
                require()
                left_s = min(connect_s, deadline.require(f"what was asked of {name}"))
                try:
                    peer = self.connections.require(name, Deadline.after(left_s))
                    left_s = deadline.require(f"what was asked of {name}")
                    self.cluster.transfers.run(ask(peer, name, left_s))
                except NotBegun:
                    if not (attempts_left and self.connections.connect_themselves):
                        raise
                else:
                    return
        finally:
            wanted.pop(call, None)


def _move(
    pieces: ByAddress,
    peer: Peer,
    name: EngineName,
    timeout_s: float,
    require: Callable[[], None] | None = None,
) -> OnLink:
    return Move(peer, str(name), timeout_s, pieces, require)


def _notice(notice: tuple[str, str], peer: Peer, name: EngineName, timeout_s: float) -> OnLink:
    return Notice(peer, str(name), timeout_s, *notice)
