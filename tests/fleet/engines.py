"""Stand-ins for vLLM's servers in a fleet: they take its requests, and compute nothing.

Decode answers with what prefill says it has computed, and refuses what it says of another prompt.
"""

from __future__ import annotations

import json
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from llm_datadist.directory import DirectoryError, FolderDirectory, Record

if TYPE_CHECKING:
    from pathlib import Path

TTL_S = 1.5


class StandIn:
    """One server, announced in a folder. Begins at once; ends with its process."""

    def __init__(self, folder: Path, number: int, role: str) -> None:
        self._number = number
        #: what arrived since `take_asked`, and what may go on
        self._asked: list[dict[str, Any]] = []
        self._open = threading.Event()
        self._open.set()
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        record = Record(
            cluster_id=number, incarnation=secrets.token_hex(16), role=role,
            labels={"engine": f"engine {number}", "worker": "0", "http": self.url},
        )  # fmt: skip
        self._announcement = FolderDirectory(folder).announce(record, TTL_S)
        threading.Thread(target=self._renew, daemon=True).start()

    def url_of(self) -> str:
        return self.url

    def take_asked(self) -> list[dict[str, Any]]:
        """The requests that came since the last call."""
        asked, self._asked = self._asked, []
        return asked

    def hold(self) -> None:
        """Answers wait from now on; a stream behind its first part."""
        self._open.clear()

    def go_on(self) -> None:
        self._open.set()

    def _renew(self) -> None:
        pause = threading.Event()
        while not pause.wait(TTL_S / 3):
            try:
                self._announcement.renew()
            except DirectoryError:
                continue  # the folder is gone; it may come back

    def _answer(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        params, prompt = request.get("kv_transfer_params") or {}, request["prompt"]
        if prompt == "an error":
            return 500, {"error": f"by {self._number}"}
        if prompt == "a mistake":
            return 400, {"error": f"by {self._number}"}
        if params.get("do_remote_decode"):
            said = {"do_remote_prefill": True, "computed": prompt, "by": self._number}
            return 200, {"kv_transfer_params": said}
        if params and params["computed"] != prompt:
            return 500, {"error": "it was another prompt"}
        return 200, {"text": f"{prompt}!", "by": [params.get("by"), self._number]}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stand_in._asked.append(request)
                status, answer = stand_in._answer(request)
                if request.get("stream"):
                    self._stream(answer)
                    return
                stand_in._open.wait()
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _stream(self, answer: dict[str, Any]) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for part in (json.dumps(answer), "[DONE]"):
                    data = f"data: {part}\n\n".encode()
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                    self.wfile.flush()
                    stand_in._open.wait()
                self.wfile.write(b"0\r\n\r\n")

            def log_message(self, *args: object) -> None:
                """Says nothing."""

        return Handler
