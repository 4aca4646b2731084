"""etcd's JSON gateway: one question, one answer."""

from __future__ import annotations

import http.client
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import msgspec

from llm_datadist.directory.base import DirectoryError

if TYPE_CHECKING:
    import ssl

_TIMEOUT_S: Final = 5.0
#: of an answer: a page of 1,000 records of the largest size
_MAX_ANSWER_NBYTES: Final = 32 * 1024 * 1024


class Gateway:
    """Where etcd answers. Thread-safe: each question has a connection of its own.

    Raises ValueError for a URL that is none of http or https.
    """

    def __init__(self, url: str, tls: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise ValueError(f"the URL of etcd must be http://host:port or https://…, got {url!r}")
        self.url = url.rstrip("/")
        self.host: str = parts.hostname
        self.port = parts.port or 2379
        self.tls = tls
        if tls is None and parts.scheme == "https":
            import ssl

            self.tls = ssl.create_default_context()

    def ask(self, path: str, body: dict[str, Any], *, is_optional: bool = False) -> dict[str, Any]:
        """The answer. Raises DirectoryError; `is_optional`: a refusal is as good as an answer."""
        try:
            status, data = self._post(path, msgspec.json.encode(body))
            answer = msgspec.json.decode(data)
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise DirectoryError(f"etcd at {self.url} does not answer: {error!r:.200}") from error
        if not isinstance(answer, dict) or (status != 200 and not is_optional):
            raise DirectoryError(f"etcd at {self.url} refuses {path}: {answer!r:.200}")
        return answer

    def connect(self, timeout_s: float = _TIMEOUT_S) -> http.client.HTTPConnection:
        """A connection that is not open yet."""
        if self.tls is None:
            return http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)
        return http.client.HTTPSConnection(
            self.host, self.port, timeout=timeout_s, context=self.tls
        )

    def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        connection = self.connect()
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            data = answer.read(_MAX_ANSWER_NBYTES + 1)
        finally:
            connection.close()
        if len(data) > _MAX_ANSWER_NBYTES:
            raise ValueError(f"an answer has more than {_MAX_ANSWER_NBYTES} bytes")
        return answer.status, data
