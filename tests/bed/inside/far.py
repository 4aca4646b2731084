"""The second machine of a part that is a pair: it runs nodes for the first one.

Each connection to it has a node in a process of its own, which ends with the connection. What is
called, its arguments and its outcome travel as between a test and its processes: by pickle, and
functions by name.
"""

from __future__ import annotations

import subprocess
import threading
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import pytest

from llm_datadist.testing.cluster import NodeProcess
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

T = TypeVar("T")

#: of the first machine and of the second
HOSTS: Final = ("198.18.1.1", "198.18.1.2")
NETDEV: Final = "eth0"
_ADDRESS: Final = (HOSTS[1], 7000)
_KEY: Final = b"bed"
#: emulated, and beside another one that boots
_BOOT_S = 300.0
_CALL_S = 120.0


#: one process after the other inherits the environment
_starting: Final = threading.Lock()


class _Outcome(NamedTuple):
    value: object = None
    error: Exception | None = None


class FarProcess:
    """A node in a process of the other machine: what a NodeProcess is here."""

    def __init__(self, **environment: str) -> None:
        """Waits for the machine, which may be booting. The process has those variables besides."""
        self._connections: list[Connection] = []
        assert eventually(self._has_connected, _BOOT_S), "the second machine does not answer"
        (self._connection,) = self._connections
        self._connection.send(environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._connection.close()

    def call(self, function: Callable[..., T], *args: object, **kwargs: object) -> T:
        """Runs `function(node, *args)` there; its result, or the exception it raised."""
        self.begin(function, *args, **kwargs)
        assert self._connection.poll(_CALL_S), "the second machine does not answer"
        outcome: _Outcome = self._connection.recv()
        if outcome.error is not None:
            raise outcome.error
        return outcome.value  # type: ignore[return-value]  # what the function returned

    def begin(self, function: Callable[..., object], *args: object, **kwargs: object) -> None:
        """As `call`, of which nobody takes the outcome."""
        self._connection.send((function, args, kwargs))

    def _has_connected(self) -> bool:
        with suppress(OSError):
            self._connections.append(Client(_ADDRESS, authkey=_KEY))
        return bool(self._connections)


def join_network(host: str) -> None:
    """Gives this machine its address, on the network that joins both."""
    for command in (f"ip addr add {host}/24 dev {NETDEV}", f"ip link set {NETDEV} up"):
        subprocess.run(command.split(), check=True)


def die(_: object) -> None:
    """This machine is gone at once: it says goodbye to nobody."""
    Path("/proc/sysrq-trigger").write_text("b")


def main() -> None:
    join_network(HOSTS[1])
    with Listener(_ADDRESS, authkey=_KEY) as listener:
        while True:
            threading.Thread(target=_serve, args=(listener.accept(),), daemon=True).start()


def _serve(connection: Connection) -> None:
    gone = suppress(EOFError, ConnectionResetError)
    with connection, gone, _process(connection.recv()) as process:
        while True:
            connection.send(_outcome(process, *connection.recv()))


def _process(environment: dict[str, str]) -> NodeProcess:
    with _starting, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return NodeProcess()


def _outcome(
    process: NodeProcess, function: Callable[..., object], args: Any, kwargs: Any
) -> _Outcome:
    try:
        return _Outcome(process.call(function, *args, **kwargs))
    except Exception as error:  # the other machine gets it
        return _Outcome(error=error)


if __name__ == "__main__":
    # functions and classes travel by the module's name
    from bed.inside import far

    far.main()
