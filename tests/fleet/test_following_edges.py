"""Following a fleet at its edges: silent directories, no threads, forks, finalize."""

from __future__ import annotations

import logging
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from directory.records import record
from edges.forking import in_child
from edges.interrupting import interrupts, is_interrupted
from edges.scarce import become_nobody, lift_limit, limit_threads
from fleet.members import PROMPTS, SOON_S, follow, follower_of, join, linked_ids, pulls_soon
from llm_datadist import LLMException, LLMRole, LLMStatusCode
from llm_datadist.directory import Changes, FolderDirectory
from llm_datadist.testing.cluster import Node, NodeProcess
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.directory import Announcement, Record, Watch


class Silent:
    """A directory that never answers, as a network file system whose server is gone."""

    def __init__(self) -> None:
        self.ends = threading.Event()

    def announce(self, record: Record, ttl_s: float) -> Announcement:
        self.ends.wait()
        raise ConnectionError("nobody is there")

    def watch(self) -> Watch:
        return self

    def wait(self, timeout_s: float) -> Changes:
        self.ends.wait()
        return Changes()

    def interrupt(self) -> None:
        """Nobody hears it."""

    def close(self) -> None:
        """Nothing is held."""


class Broken(Silent):
    """Another package's directory, with a mistake in it."""

    def announce(self, record: Record, ttl_s: float) -> Announcement:
        raise KeyError("announce")

    def wait(self, timeout_s: float) -> Changes:
        raise ZeroDivisionError


@pytest.fixture
def silent() -> Iterator[Silent]:
    directory = Silent()
    yield directory
    directory.ends.set()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Where connections are accepted by the kernel and nobody ever answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as sock:
        yield sock.getsockname()[1]


@pytest.fixture
def decode(node: Node) -> Node:
    node.start(LLMRole.DECODER, 2, listen_ip_info="127.0.0.1:0", sync_kv_timeout=1000)
    return node


def test_a_silent_directory_is_waited_for_by_nobody(decode: Node, silent: Silent) -> None:
    with takes_at_most(1.0):
        follower = decode.datadist.follow(silent, PROMPTS)
        assert follower.members() == []
        assert not follower.wait_for(1, 0.1)
        fleet = decode.datadist.stats().fleet
        assert fleet is not None
        assert not fleet.is_announced
    with takes_at_most(4.0):
        follower.stop()
    decode.datadist.follow(silent, PROMPTS)
    with takes_at_most(8.0):
        decode.datadist.finalize()


def test_a_directory_with_a_mistake_costs_nothing_but_itself(
    decode: Node, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "LLM_DATADIST"):
        follower = decode.datadist.follow(Broken(), PROMPTS)
        assert eventually(lambda: "announce" in caplog.text and "ZeroDivision" in caplog.text)
    with takes_at_most(2.0):
        follower.stop()
    follow(decode, tmp_path, PROMPTS)
    assert eventually(lambda: (tmp_path / "2.json").exists())


def test_finalize_says_that_we_leave(decode: Node, tmp_path: Path) -> None:
    watch = FolderDirectory(tmp_path).watch()
    follow(decode, tmp_path, PROMPTS, ttl_s=600)
    assert [each.cluster_id for each in watch.wait(SOON_S).joined] == [2]
    decode.datadist.finalize()
    assert [each.cluster_id for each in watch.wait(SOON_S).left] == [2]
    assert not any("announcer" in thread.name for thread in threading.enumerate())
    watch.close()


def test_finalize_while_links_are_being_made(
    decode: Node, tmp_path: Path, silent_port: int
) -> None:
    for cluster_id in range(100, 140):
        FolderDirectory(tmp_path).announce(
            record(cluster_id, listen=f"127.0.0.1:{silent_port}", facts=FACTS), 600
        ).close()
    follow(decode, tmp_path, PROMPTS)
    assert eventually(lambda: len(follower_of(decode).members()) == 40, SOON_S)
    with takes_at_most(6.0):
        decode.datadist.finalize()


def test_one_fleet_at_a_time(decode: Node, tmp_path: Path) -> None:
    follow(decode, tmp_path)
    with pytest.raises(LLMException, match="follows a fleet already"):
        follow(decode, tmp_path)


@pytest.mark.parametrize(
    ("said", "error", "match"),
    [
        ({"advertised": "10.0.0.1:0"}, ValueError, "no address that can be called"),
        ({"advertised": "10.0.0.1 :5"}, ValueError, "no address that can be called"),
        ({"advertised": 5}, TypeError, "advertised"),
        ({"facts": {"a": 1}}, TypeError, "facts"),
        ({"labels": {"a": "\x1b[0m"}}, ValueError, "characters that print"),
        ({"labels": {str(index): "" for index in range(65)}}, ValueError, "no record"),
        ({"ttl_s": 0.5}, ValueError, "ttl_s"),
        ({"wants": "prompts"}, TypeError, "wants"),
    ],
)
def test_what_cannot_be_announced_is_refused_at_once(
    decode: Node, tmp_path: Path, said: dict[str, object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        decode.datadist.follow(f"folder:{tmp_path}", **said)  # type: ignore[arg-type]
    follow(decode, tmp_path)


def test_who_listens_on_every_address_says_where_it_is_reached(node: Node, tmp_path: Path) -> None:
    node.start(LLMRole.PROMPT, 1, listen_ip_info="0.0.0.0:0")
    with pytest.raises(LLMException, match="say by which one others reach it"):
        follow(node, tmp_path)
    watch = FolderDirectory(tmp_path).watch()
    follow(node, tmp_path, advertised="pod-7.example")
    endpoint = node.datadist.listen_endpoint
    assert endpoint is not None
    (said,) = watch.wait(SOON_S).joined
    assert said.endpoint == ("pod-7.example", endpoint.port)
    watch.close()


def test_no_directory_of_that_name(decode: Node) -> None:
    for name in ("nonsense", "folder:", "zookeeper://127.0.0.1"):
        with pytest.raises(LLMException, match="no directory is called") as caught:
            decode.datadist.follow(name)
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.parametrize("more", [0, 1])
def test_where_no_threads_are_to_be_had_it_is_said(more: int) -> None:
    with NodeProcess() as process:
        process.call(follows_without_threads, 42_000 + more, more)


def follows_without_threads(node: Node, uid: int, more: int) -> None:
    become_nobody(uid)
    folder = Path(tempfile.mkdtemp())
    node.start(LLMRole.DECODER, 2)
    limit_threads(more)
    with pytest.raises(LLMException, match="no more threads") as caught:
        follow(node, folder)
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED
    lift_limit()
    follow(node, folder)
    assert eventually(lambda: (folder / "2.json").exists())
    with takes_at_most(4.0):
        node.datadist.finalize()


def test_interruptions_leave_nothing_behind(tmp_path: Path) -> None:
    with NodeProcess() as process:
        assert process.call(follow_interrupted, tmp_path) > 20


def follow_interrupted(node: Node, folder: Path) -> int:
    """How often it was; raises AssertionError for what is left then."""
    node.start(LLMRole.DECODER, 2, listen_ip_info="127.0.0.1:0", sync_kv_timeout=1000)
    datadist, rng, count = node.datadist, random.Random(1), 0

    def join_and_leave() -> None:
        try:
            datadist.follow(f"folder:{folder}", PROMPTS).wait_for(99, 0.002)
        except LLMException as error:  # one that was interrupted is being taken back
            if "follows a fleet already" not in str(error):
                raise
        finally:
            if datadist.follower is not None:
                datadist.follower.stop()

    def has_left() -> bool:
        if datadist.follower is not None:
            datadist.follower.stop()
        return not threads_of_followers()

    join_and_leave()
    before = open_files()
    with interrupts():
        for _ in range(60):
            count += is_interrupted(join_and_leave, rng.uniform(1e-4, 2e-2))
    assert eventually(has_left, SOON_S)
    assert eventually(lambda: not threads_of_followers(), SOON_S), threads_of_followers()
    assert eventually(lambda: open_files() <= before, SOON_S)
    join_and_leave()
    with takes_at_most(4.0):
        datadist.finalize()
    return count


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def threads_of_followers() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.endswith(("-announcer", "-watcher"))]


def test_a_forked_child_follows_nothing_and_ends_nothing(decode: Node, tmp_path: Path) -> None:
    with NodeProcess() as peer:
        join(peer, tmp_path)
        follow(decode, tmp_path, PROMPTS)
        assert pulls_soon(decode)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                follower_of(decode).members()
            except RuntimeError as error:
                code = 0 if "forked" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        time.sleep(0.1)  # what the child would have written
        assert linked_ids(decode) == [1]
        assert pulls_soon(decode)


FACTS = {"protocol": "1", "remote accessible": "False"}


@pytest.mark.parametrize("word", ["has joined", "cannot be announced", "not heard of"])
def test_a_logging_handler_that_raises_ends_nothing(
    decode: Node, tmp_path: Path, word: str
) -> None:
    class Raises(logging.Handler):
        left = 1

        def emit(self, said: logging.LogRecord) -> None:
            if word in said.getMessage() and self.left:
                self.left -= 1
                raise ValueError("the program's own")

    folder, away, handler = tmp_path / "fleet", tmp_path / "away", Raises()
    folder.mkdir()
    logger = logging.getLogger("LLM_DATADIST")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        follow(decode, folder, None, ttl_s=1.0)
        assert eventually(lambda: follower_of(decode).stats().is_announced, SOON_S)
        if word != "has joined":
            folder.rename(away)
            assert eventually(lambda: not handler.left, SOON_S)
            away.rename(folder)
        directory = FolderDirectory(folder)
        for number in (11, 12):
            directory.announce(record(number), 600).close()
        found = eventually(
            lambda: {each.record.cluster_id for each in follower_of(decode).members()} == {11, 12},
            SOON_S,
        )
        assert found
        assert not handler.left
        watch = directory.watch()
        assert eventually(lambda: 2 in _ids(watch), SOON_S), "it goes on saying that it is there"
        watch.close()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _ids(watch: Watch) -> set[int]:
    return {each.cluster_id for each in watch.wait(0.2).joined}


def test_what_a_forked_child_says_of_the_end_is_not_heard_by_the_parent(
    decode: Node, tmp_path: Path
) -> None:
    follow(decode, tmp_path, PROMPTS, ttl_s=1.0)
    follower = follower_of(decode)
    assert eventually(lambda: follower.stats().is_announced, SOON_S)

    def end() -> str:
        follower.begin_end()
        return "said"

    assert in_child(end) == "said"
    directory = FolderDirectory(tmp_path)
    directory.announce(record(11), 600).close()
    assert eventually(lambda: len(follower.members()) == 1, SOON_S)
    before = time.process_time()
    assert not follower.wait_for(77, 1.0)
    assert time.process_time() - before < 0.5, "nobody spins"


def test_who_follows_no_fleet_imports_nothing_of_it() -> None:
    program = """
import sys
from llm_datadist import LLMConfig, LLMDataDist, LLMRole
config = LLMConfig()
config.enable_cache_manager = True
datadist = LLMDataDist(LLMRole.PROMPT, 1)
datadist.init(config.generate_options())
assert "llm_datadist.directory" not in sys.modules
assert "http.client" not in sys.modules
datadist.finalize()
"""
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)
