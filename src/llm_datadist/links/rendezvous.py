"""The rendezvous: how members of a rank-table link on one host find each other. Spec 12.3.

Each member writes the port it listens on into a file named by the link and its cluster id, and
looks for the files of the others. Whoever comes second finds the first: nobody watches or polls.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from pathlib import Path

from llm_datadist.errors import LLMException, LLMStatusCode


class Rendezvous:
    """A directory that only this user can write to."""

    def __init__(self) -> None:
        #: loopback addresses mean something else in another network namespace
        self._network = os.readlink("/proc/self/ns/net")
        self._directory = _directory()

    def publish(self, group: str, cluster_id: int, port: int) -> str:
        """Says where a member listens, in place of what was said before; a token for `withdraw`.

        Raises LLMException(LLM_LINK_FAILED).
        """
        path, token = self._path(group, cluster_id), secrets.token_hex(8)
        draft = path.with_name(f"{path.name}.{token}")
        try:
            draft.write_text(f"{port} {token} {self._network}")
            draft.replace(path)
        except OSError as error:
            raise _unusable(path, error) from error
        return token

    def withdraw(self, group: str, cluster_id: int, token: str) -> None:
        """Takes back what was published with this token; what came after it stays."""
        record = self._read(group, cluster_id)
        if record is not None and record[1] == token:
            with contextlib.suppress(FileNotFoundError):
                self._path(group, cluster_id).unlink()

    def find(self, group: str, cluster_id: int) -> int | None:
        """The port of a member that has published itself in our network namespace."""
        record = self._read(group, cluster_id)
        if record is None or record[2] != self._network:
            return None
        return int(record[0])

    def _read(self, group: str, cluster_id: int) -> list[str] | None:
        try:
            record = self._path(group, cluster_id).read_text().split()
        except FileNotFoundError:
            return None
        return record if len(record) == 3 and record[0].isdigit() else None

    def _path(self, group: str, cluster_id: int) -> Path:
        return self._directory / f"{group}-{cluster_id}"


def _directory() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        path = Path(runtime) / "llm-datadist"
    else:
        path = Path(tempfile.gettempdir()) / f"llm-datadist-{os.getuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = path.lstat()
    except OSError as error:
        raise _unusable(path, error) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise LLMException(
            f"{path} is not a directory that only this user can write to: remove it",
            LLMStatusCode.LLM_LINK_FAILED,
        )
    return path


def _unusable(path: Path, error: OSError) -> LLMException:
    return LLMException(
        f"members of a rank-table link cannot meet at {path}: {error.strerror}; point "
        "XDG_RUNTIME_DIR to a directory of this user's",
        LLMStatusCode.LLM_LINK_FAILED,
    )
