"""Debian's etcd, on a port of 127.0.0.1 and in a folder of the test's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llm_datadist.directory import DirectoryError
from llm_datadist.directory.gateway import Gateway
from llm_datadist.testing.cluster import free_port
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from typing_extensions import Self

#: where `make` puts it when the system has none
_OURS = Path(__file__).parents[2] / ".venv" / "etcd" / "usr" / "bin"
_START_S = 20.0


class EtcdServer:
    """A server that a test starts, stops and continues. A context manager."""

    def __init__(self, folder: Path, program: str) -> None:
        self._folder, self._program = folder, program
        self._port, self._peer_port = free_port(), free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    def start(self) -> None:
        """Starts it on the same port, with the data it had, and waits until it answers."""
        peers = f"http://127.0.0.1:{self._peer_port}"
        self._process = subprocess.Popen(
            [
                self._program, "--name", "one", "--data-dir", str(self._folder / "data"),
                "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
                "--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers,
                "--initial-cluster", f"one={peers}",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "ETCD_UNSUPPORTED_ARCH": os.uname().machine},
        )  # fmt: skip
        assert eventually(self._answers, _START_S), "etcd does not start"

    def kill(self) -> None:
        """SIGKILL, waited for. May be called again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None

    def forget(self) -> None:
        """Its data are lost. It must not run."""
        shutil.rmtree(self._folder / "data")

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)  # all its threads stand still

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def put(self, key: bytes, value: bytes) -> None:
        """By whoever may write there."""
        from base64 import b64encode

        body = {"key": b64encode(key).decode(), "value": b64encode(value).decode()}
        Gateway(self.url).ask("/v3/kv/put", body)

    def delete_all(self) -> None:
        Gateway(self.url).ask("/v3/kv/deleterange", {"key": "AA==", "range_end": "AA=="})

    def _answers(self) -> bool:
        try:
            Gateway(self.url).ask("/v3/lease/leases", {})
        except DirectoryError:
            return False
        return True


def etcd_program() -> str:
    """Skips the test where there is none."""
    program = shutil.which("etcd", path=os.pathsep.join([os.environ.get("PATH", ""), str(_OURS)]))
    if program is None:
        pytest.skip("etcd is not installed (apt-get install etcd-server)")
    return program
