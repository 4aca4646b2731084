"""etcd as a directory, at its edges: restarts, lost data, a server that stands still, strangers."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING

import pytest

from directory.etcd_server import EtcdServer, etcd_program
from directory.records import nothing, record, until
from directory.test_folder import HOSTILE
from llm_datadist.directory import DirectoryError, EtcdDirectory
from llm_datadist.directory.chunks import Chunks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TTL_S = 2.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path, etcd_program()) as server:
        yield server


@pytest.mark.parametrize("are_lost", [False, True], ids=["kept", "lost"])
def test_a_server_that_was_gone_changes_nothing(server: EtcdServer, are_lost: bool) -> None:
    directory = EtcdDirectory(server.url)
    watch, announcement = directory.watch(), directory.announce(record(1), TTL_S)
    dead = directory.announce(record(2), TTL_S)
    assert len(until(watch, bool).joined) == 2
    server.kill()
    with pytest.raises(DirectoryError):
        watch.wait(5)
    with pytest.raises(DirectoryError, match="does not answer"):
        announcement.renew()
    assert nothing(watch, 2 * TTL_S)
    if are_lost:
        server.forget()
    server.start()
    end, left = time.monotonic() + 30, None
    while not left and time.monotonic() < end:
        announcement.renew()
        left = watch.wait(TTL_S / 4)
    assert left == ((), (record(2),), ())
    for each in (watch, announcement, dead):
        each.close()


def test_keys_that_somebody_deleted_are_put_again(server: EtcdServer) -> None:
    directory = EtcdDirectory(server.url)
    watch, announcement = directory.watch(), directory.announce(record(1), TTL_S)
    until(watch, bool)
    server.delete_all()
    assert nothing(watch, TTL_S / 2)
    announcement.renew()
    assert nothing(watch, 1.5 * TTL_S / 2)
    late = directory.watch()
    assert until(late, bool).joined == (record(1),)
    for each in (watch, announcement, late):
        each.close()


def test_a_server_that_stands_still_is_not_waited_for(server: EtcdServer) -> None:
    directory = EtcdDirectory(server.url)
    watch, announcement = directory.watch(), directory.announce(record(1), 60)
    until(watch, bool)
    server.pause()
    try:
        begun = time.monotonic()
        with pytest.raises(DirectoryError, match="does not answer"):
            announcement.renew()
        assert time.monotonic() - begun < 10
        assert nothing(watch, 0.5)
    finally:
        server.resume()
    announcement.renew()
    for each in (watch, announcement):
        each.close()


def test_what_is_no_record_is_left_out(server: EtcdServer) -> None:
    directory = EtcdDirectory(server.url)
    for index, text in enumerate(HOSTILE.values()):
        server.put(b"/llm-datadist/7", text.encode("utf-8", "surrogatepass"))
        server.put(b"/llm-datadist/%d" % (100 + index), text.encode("utf-8", "surrogatepass"))
    for key in (b"/llm-datadist/07", b"/llm-datadist/", b"/llm-datadist/x", b"/llm-datadist/\xff"):
        server.put(key, b"{}")
    watch, announcement = directory.watch(), directory.announce(record(1), TTL_S)
    assert until(watch, bool).joined == (record(1),)
    for text in HOSTILE.values():
        server.put(b"/llm-datadist/9", text.encode("utf-8", "surrogatepass"))
    announcement.change(record(1, role="MIX"))
    assert until(watch, bool).changed[0].now.role == "MIX"
    for each in (watch, announcement):
        each.close()


def test_many_members_are_listed_page_by_page(server: EtcdServer) -> None:
    text = '{"record":{"cluster_id":%d,"incarnation":"%032x","role":"MIX"},"ttl_s":60.0}'
    for cluster_id in range(1200):
        server.put(b"/llm-datadist/%d" % cluster_id, (text % (cluster_id, 1)).encode())
    watch = EtcdDirectory(server.url).watch()
    assert len(watch.wait(30).joined) == 1200
    watch.close()


def test_nobody_at_the_address() -> None:
    directory = EtcdDirectory("http://127.0.0.1:1")
    watch = directory.watch()
    with pytest.raises(DirectoryError, match="does not answer"):
        directory.announce(record(1), TTL_S)
    with pytest.raises(DirectoryError, match="does not answer"):
        watch.wait(1)
    watch.close()


@pytest.mark.parametrize("answer", [{}, {"header": []}, {"header": {"revision": "1"}, "kvs": 5}])
def test_an_answer_of_another_shape_is_none(answer: dict[str, object]) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Tests are quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        watch = EtcdDirectory(f"http://127.0.0.1:{server.server_port}").watch()
        try:
            with pytest.raises(DirectoryError, match="etcd at"):
                watch.wait(1)
        finally:
            watch.close()
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("url", ["127.0.0.1:2379", "ftp://h", "http://", "http://u:p@h"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ValueError, match="the URL of etcd"):
        EtcdDirectory(url)


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_lines_come_out_however_the_bytes_come() -> None:
    whole = HEAD + b'5\r\n{"a":\r\n6;x=y\r\n1}\n{}\n\r\n3\r\nend\r\n'
    for step in (1, 2, 3, 7, len(whole)):
        chunks, lines = Chunks(), []
        for at in range(0, len(whole), step):
            lines += chunks.add(whole[at : at + step])
        assert lines == [b'{"a":1}', b"{}"]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 404 Not Found\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
        b"nonsense\r\n\r\n",
        HEAD + b"0\r\n\r\n",
        HEAD + b"-5\r\nabc",
        HEAD + b"zz\r\nabc",
        HEAD + b"fffffffffffffffff\r\nabc",
        b"x" * 70_000,
        HEAD + b"1" * 70_000,
    ],
)
def test_an_answer_of_another_kind_ends_the_stream(answer: bytes) -> None:
    with pytest.raises(ValueError, match=r"answer|chunk|literal|line"):
        Chunks().add(answer)
