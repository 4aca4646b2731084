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
#: how a question is refused whose token has ended, or is of other users and roles than now
_TOKEN_ENDED: Final = (400, 401)


class Gateway:
    """Where etcd answers. Thread-safe: each question has a connection of its own.

    With a user it asks as that one, by a token that etcd gives for the password, and anew when a
    token has ended. Raises ValueError for a URL that is none of http or https.
    """

    def __init__(
        self, url: str, tls: ssl.SSLContext | None = None, user: str = "", password: str = ""
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise ValueError(f"the URL of etcd must be http://host:port or https://…, got {url!r}")
        self.url = url.rstrip("/")
        self.host: str = parts.hostname
        self.port = parts.port or 2379
        self._user, self._password = user, password
        self._token = ""
        self.tls = tls if parts.scheme == "https" else None
        if tls is None and parts.scheme == "https":
            import ssl

            self.tls = ssl.create_default_context()

    def ask(self, path: str, body: dict[str, Any], *, is_optional: bool = False) -> dict[str, Any]:
        """The answer. Raises DirectoryError; `is_optional`: a refusal is as good as an answer."""
        had_token = bool(self._token)
        status, answer = self._ask_once(path, body, self.token())
        if status in _TOKEN_ENDED and had_token:
            self._token = ""
            status, answer = self._ask_once(path, body, self.token())
        if status != 200 and not is_optional:
            raise DirectoryError(f"etcd at {self.url} refuses {path}: {answer!r:.200}")
        return answer

    def token(self) -> str:
        """By what etcd knows our user; empty without one. Raises DirectoryError."""
        if self._user and not self._token:
            who = {"name": self._user, "password": self._password}
            status, answer = self._ask_once("/v3/auth/authenticate", who, "")
            token = answer.get("token")
            if status != 200 or not isinstance(token, str) or not token.isprintable():
                raise DirectoryError(
                    f"etcd at {self.url} does not let {self._user} in: {answer!r:.200}"
                )
            self._token = token
        return self._token

    def connect(self, timeout_s: float = _TIMEOUT_S) -> http.client.HTTPConnection:
        """A connection that is not open yet."""
        if self.tls is None:
            return http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)
        return http.client.HTTPSConnection(
            self.host, self.port, timeout=timeout_s, context=self.tls
        )

    def _ask_once(self, path: str, body: dict[str, Any], token: str) -> tuple[int, dict[str, Any]]:
        try:
            status, data = self._post(path, msgspec.json.encode(body), token)
            answer = msgspec.json.decode(data)
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise DirectoryError(f"etcd at {self.url} does not answer: {error!r:.200}") from error
        if not isinstance(answer, dict):
            raise DirectoryError(f"etcd at {self.url} refuses {path}: {answer!r:.200}")
        return status, answer

    def _post(self, path: str, body: bytes, token: str) -> tuple[int, bytes]:
        connection = self.connect()
        try:
            connection.request("POST", path, body, headers_of(token))
            answer = connection.getresponse()
            data = answer.read(_MAX_ANSWER_NBYTES + 1)
        finally:
            connection.close()
        if len(data) > _MAX_ANSWER_NBYTES:
            raise ValueError(f"an answer has more than {_MAX_ANSWER_NBYTES} bytes")
        return answer.status, data


def headers_of(token: str) -> dict[str, str]:
    """Of a question that is asked by that token."""
    headers = {"Content-Type": "application/json"}
    return {**headers, "Authorization": token} if token else headers
