"""A network that fails on demand: a TCP relay that a test puts in front of a listener.

    with FaultProxy(port) as proxy:
        node.link(proxy.port, cluster_id)  # in place of `port`
        proxy.cut(after_nbytes=100_000)  # in the middle of the next pull
        ...
        proxy.restore()

A fault lasts until `restore`, for the connections there are and for new ones. All connections of a
link go through the proxy, since it is the caller that dials them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.testing.relay import Faults, Relay

if TYPE_CHECKING:
    from typing_extensions import Self


class FaultProxy:
    """Relays TCP to a listener, as it is or with faults. A context manager.

    A thread of its own does the work, and sleeps while nothing happens. Faults may be called from
    any thread, hold when the call returns, and add up: a slow network can be cut. `to_caller` says
    in which direction: from the listener to its caller, or back.
    """

    def __init__(self, port: int, host: str = "127.0.0.1", *, own_port: int = 0) -> None:
        """`own_port`: where it is to be dialled, at 127.0.0.1; 0: at a free one."""
        self._relay = Relay(port, host, own_port)
        #: where to dial
        self.port = self._relay.port

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def num_connections(self) -> int:
        """How many callers it connects just now."""
        return len(self._relay.connections)

    def nbytes_passed(self, *, to_caller: bool = True) -> int:
        """How many bytes it has passed on so far, over all connections."""
        passed = 0

        def command() -> None:  # so that what has just arrived is counted
            nonlocal passed
            passed = self._relay.passed[to_caller]

        self._relay.do(command)
        return passed

    def cut(self, after_nbytes: int = 0, *, to_caller: bool = True) -> None:
        """Resets all connections, and new ones at once: now, or once so many more bytes passed.

        At most so many bytes arrive: what is on its way when a connection is reset may be lost.
        """

        def command() -> None:
            self._relay.came.clear()
            self._relay.faults.cut_after[to_caller] = after_nbytes
            if after_nbytes <= 0:
                self._relay.cut()

        self._relay.do(command)

    def stall(self) -> None:
        """Passes nothing on. The connections stay open; what is sent arrives after `restore`."""

        def command() -> None:
            self._relay.faults.is_stalled = True

        self._relay.do(command)

    def half_close(self, *, to_caller: bool = True) -> None:
        """Ends one direction of all connections: the receiver is told, the sender is not.

        What the sender says from then on is lost. Connections that were half closed stay so.
        """

        def command() -> None:
            self._relay.faults.half_closed.add(to_caller)
            for connection in self._relay.connections:
                connection.pipes[to_caller].end()

        self._relay.do(command)

    def slow(self, nbytes_per_s: float) -> None:
        """Passes on so many bytes a second, of all connections and directions together."""
        if nbytes_per_s <= 0:
            raise ValueError(f"nbytes_per_s must be greater than 0, got {nbytes_per_s}")

        def command() -> None:
            self._relay.faults.nbytes_per_s = nbytes_per_s

        self._relay.do(command)

    def corrupt(self, after_nbytes: int = 0, *, to_caller: bool = True) -> None:
        """Flips one bit, once: of the byte that comes after so many more bytes."""

        def command() -> None:
            self._relay.came.clear()
            self._relay.faults.flip_after[to_caller] = after_nbytes

        self._relay.do(command)

    def wait(self, timeout_s: float = 0.0) -> bool:
        """Whether the cut or the flipped bit that was asked for last has come by then."""
        return self._relay.came.wait(timeout_s)

    def restore(self) -> None:
        """Ends all faults, those that have not come yet as well. What was cut stays cut."""

        def command() -> None:
            self._relay.came.clear()
            self._relay.faults = Faults()

        self._relay.do(command)

    def close(self) -> None:
        """Closes all connections and the port. May be called again."""
        self._relay.close()
