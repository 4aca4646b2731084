"""One member of the fleet under load, in a process of its own: it owns bytes, and pulls others'.

What it owns is made of a tag, new at each start, which its record says: so a reader can tell whose
bytes it has.
"""

from __future__ import annotations

import os
import random
import secrets
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llm_datadist import BlocksCacheKey, LLMException, LLMRole, LLMStatusCode, Wants
from llm_datadist.testing.cluster import Bytes, Node, make_array

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from llm_datadist.directory import Record

SHAPE = (4, 16, 4096)
BLOCKS = 4
DEADLINE_S = 3.0
PAUSE_S = 0.02
GOOD = LLMStatusCode.LLM_SUCCESS.name
WRONG, STRANGE = "wrong bytes", "no LLMException"


class Pull(NamedTuple):
    """What a reader notes of one pull; times are of the host's monotonic clock."""

    began: float
    ended: float
    reader: int
    tag: str  #: the reader's
    owner: int
    read: str  #: the owner's tag; empty where nothing came
    status: str

    @classmethod
    def parse(cls, line: str) -> Pull:
        began, ended, reader, tag, owner, read, status = line.rstrip("\n").split("\t")
        return cls(float(began), float(ended), int(reader), tag, int(owner), read, status)


class Setting(NamedTuple):
    """How a member is started."""

    cluster_id: int
    role: LLMRole
    port: int
    advertised: str
    path: str
    directory: str
    ttl_s: float
    notes: Path


class Failed(Exception):
    """A pull has failed; the message is its status."""


class Load:
    """Owns bytes that are made of its tag, pulls others', and notes what came of each pull.

    What moves them is a subclass's. Ends with its process.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting, self.role = setting, setting.role
        self.tag = secrets.token_hex(7)
        self.ready_at = 0.0

    def members(self) -> list[Record]:
        """Everybody who is announced, but this one."""
        raise NotImplementedError

    def pull(self, owner: Record, src: list[int], dst: list[int]) -> Bytes:
        """Reads these blocks of that member's; what has come. Raises Failed."""
        raise NotImplementedError

    def begin(self) -> None:
        """It has joined the fleet."""
        self.ready_at = time.monotonic()
        self._fd = os.open(self.setting.notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        threading.Thread(target=self._pull_for_ever, daemon=True).start()

    def when(self) -> tuple[str, float]:
        """Which start this is, and since when it is ready."""
        return self.tag, self.ready_at

    def switch(self, role: LLMRole) -> None:
        """Has another role from now on."""
        self.role = role

    def _pull_for_ever(self) -> None:
        rng = random.Random(self.tag)
        while True:
            owners = [each for each in self.members() if each.role == LLMRole.PROMPT.name]
            if owners and self.role is LLMRole.DECODER:
                self._note(rng, rng.choice(owners))
            time.sleep(PAUSE_S)

    def _note(self, rng: random.Random, owner: Record) -> None:
        began = time.monotonic()
        read, status = "", GOOD
        src, dst = (rng.sample(range(SHAPE[1]), BLOCKS) for _ in range(2))
        try:
            got = self.pull(owner, src, dst)
            ended = time.monotonic()
            candidates = {owner.labels["tag"], *self._tags(owner.cluster_id)}
            read = whose(got, src, candidates)
            status = status if read else WRONG
        except Failed as error:
            ended, status = time.monotonic(), str(error)
        except Exception as error:
            ended = time.monotonic()
            status = f"{STRANGE}: {error!r}".replace("\t", " ").replace("\n", " ")
        id_ = self.setting.cluster_id
        pull = Pull(began, ended, id_, self.tag, owner.cluster_id, read, status)
        os.write(self._fd, ("\t".join(map(str, pull)) + "\n").encode())

    def _tags(self, cluster_id: int) -> Iterator[str]:
        """Of that member, as it is announced now."""
        return (each.labels["tag"] for each in self.members() if each.cluster_id == cluster_id)


class Worker(Load):
    """A member by this library."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._node = node = Node()
        node.start(
            setting.role,
            setting.cluster_id,
            listen_ip_info=f"127.0.0.1:{setting.port}",
            transfer_path=setting.path,
            sync_kv_timeout=int(DEADLINE_S * 1000),
            enable_remote_cache_accessible=True,
        )
        self._sink = node.blocks_cache(*SHAPE)
        owned = node.blocks_cache(*SHAPE, key=BlocksCacheKey(0, 0))
        node.arrays[owned.cache_id][:] = bytes_of(self.tag)  # before anybody can know of it
        self._follower = node.datadist.follow(
            setting.directory,
            Wants([LLMRole.PROMPT]),
            advertised=setting.advertised,
            labels={"tag": self.tag},
            ttl_s=setting.ttl_s,
        )
        self.begin()

    def members(self) -> list[Record]:
        return [member.record for member in self._follower.members()]

    def pull(self, owner: Record, src: list[int], dst: list[int]) -> Bytes:
        key = BlocksCacheKey(owner.cluster_id, 0)
        try:
            self._node.manager.pull_blocks(key, self._sink, src, dst)
        except LLMException as error:
            raise Failed(error.status_code.name) from error
        return self._node.arrays[self._sink.cache_id][:, dst]

    def switch(self, role: LLMRole) -> None:
        listen = {"llm.listenIpInfo": f"127.0.0.1:{self.setting.port}"}
        self._node.datadist.switch_role(role, listen)
        super().switch(role)


_known: dict[str, Bytes] = {}


def bytes_of(tag: str) -> Bytes:
    """What that start of a member owns."""
    if tag not in _known:
        if len(_known) > 32:
            _known.clear()
        _known[tag] = make_array(SHAPE, int(tag, 16))
    return _known[tag]


def whose(got: Bytes, blocks: list[int], candidates: set[str]) -> str:
    """Which of these starts all of the bytes are of; empty: of none, or of several."""
    for tag in candidates:
        if np.array_equal(got, bytes_of(tag)[:, blocks]):
            return tag
    return ""


def pulls_in(folder: Path) -> Iterator[Pull]:
    """All that was noted."""
    for file in folder.iterdir():
        with open(file) as lines:
            for line in lines:
                if line.endswith("\n"):
                    yield Pull.parse(line)
