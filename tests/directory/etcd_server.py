"""Debian's etcd, on a port of 127.0.0.1 and in a folder of the test's."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from llm_datadist.directory import DirectoryError
from llm_datadist.directory.gateway import Gateway
from llm_datadist.testing.cluster import free_port
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from typing_extensions import Self

    from certificates import Files

#: where `make` puts it when the system has none
_OURS = Path(__file__).parents[2] / ".venv" / "etcd" / "usr" / "bin"
_START_S = 20.0


class EtcdServer:
    """A server that a test starts, stops and continues. A context manager."""

    def __init__(self, folder: Path, program: str, files: Files | None = None) -> None:
        """With files it answers by TLS, to who has a certificate of that authority."""
        self._folder, self._program, self._files = folder, program, files
        self._port, self._peer_port = free_port(), free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self._files else 'http'}://127.0.0.1:{self._port}"

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
                "--initial-cluster", f"one={peers}", *self._tls_options(),
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
        self.ask("/v3/kv/put", body)

    def delete_all(self) -> None:
        self.ask("/v3/kv/deleterange", {"key": "AA==", "range_end": "AA=="})

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A question of its administrator's, while nobody needs a user."""
        return Gateway(self.url, self._tls()).ask(path, body)

    def _answers(self) -> bool:
        try:
            self.ask("/v3/lease/leases", {})
        except DirectoryError as error:
            return "refuses" in str(error)  # who may ask is another question
        return True

    def _tls(self) -> ssl.SSLContext | None:
        if self._files is None:
            return None
        context = ssl.create_default_context(cafile=self._files.ca)
        context.load_cert_chain(self._files.certificate, self._files.key)
        return context

    def _tls_options(self) -> list[str]:
        if self._files is None:
            return []
        return [
            "--cert-file", str(self._files.certificate), "--key-file", str(self._files.key),
            "--trusted-ca-file", str(self._files.ca), "--client-cert-auth",
        ]  # fmt: skip


def etcd_program() -> str:
    """Skips the test where there is none."""
    program = shutil.which("etcd", path=os.pathsep.join([os.environ.get("PATH", ""), str(_OURS)]))
    if program is None:
        pytest.skip("etcd is not installed (apt-get install etcd-server)")
    return program
