"""Members of the fleet by other libraries: NIXL and Mooncake, as their Python interfaces have it.

Neither has anything like a directory, so who is there they are told by ours, and the program does
the rest: what a peer's record says of its memory is loaded when it is first read, and anew when a
read has failed or another start is announced. They have no roles and nothing to follow; what is
measured is what becomes of their reads.
"""

from __future__ import annotations

import base64
import secrets
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from fleet.worker import DEADLINE_S, SHAPE, Failed, Load, bytes_of
from llm_datadist.directory import DirectoryError, Record, open_directory
from llm_datadist.testing.cluster import make_array

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fleet.worker import Setting
    from llm_datadist import LLMRole
    from llm_datadist.directory import Changes
    from llm_datadist.testing.cluster import Bytes

_BLOCK_NBYTES = SHAPE[2]
_TENSOR_NBYTES = SHAPE[1] * _BLOCK_NBYTES


class Rival(Load):
    """The part that both have: memory, and what the directory says."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.owned, self.sink = bytes_of(self.tag).copy(), make_array(SHAPE, 0)
        self._records: dict[int, Record] = {}
        self._directory = open_directory(setting.directory)
        where = self.start()
        self._record = Record(
            cluster_id=setting.cluster_id, incarnation=secrets.token_hex(16),
            role=setting.role.name,
            labels={"tag": self.tag, "base": str(self.owned.ctypes.data), **where},
        )  # fmt: skip
        threading.Thread(target=self._announce, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()
        self.begin()

    def start(self) -> dict[str, str]:
        """Registers both memories; what others must be told."""
        raise NotImplementedError

    def read(self, owner: Record, local: list[int], remote: list[int]) -> None:
        """Blocks from there to here. Raises Failed."""
        raise NotImplementedError

    def members(self) -> list[Record]:
        return list(self._records.values())

    def pull(self, owner: Record, src: list[int], dst: list[int]) -> Bytes:
        local = _addrs(self.sink.ctypes.data, dst)
        self.read(owner, local, _addrs(int(owner.labels["base"]), src))
        return self.sink[:, dst]

    def switch(self, role: LLMRole) -> None:
        import msgspec

        self._record = msgspec.structs.replace(self._record, role=role.name)
        super().switch(role)

    def _announce(self) -> None:
        announcement, said = None, self._record
        while True:
            record = self._record
            try:
                if announcement is None:
                    announcement = self._directory.announce(record, self.setting.ttl_s)
                elif said != record:
                    announcement.change(record)
                else:
                    announcement.renew()
                said = record
            except DirectoryError:
                time.sleep(0.1)
                continue
            end = time.monotonic() + self.setting.ttl_s / 3
            while time.monotonic() < end and self._record is record:
                time.sleep(0.02)

    def _watch(self) -> None:
        watch = self._directory.watch()
        while True:
            try:
                self._told(watch.wait(60))
            except DirectoryError:
                time.sleep(0.1)

    def _told(self, changes: Changes) -> None:
        for record in changes.left:
            self._records.pop(record.cluster_id, None)
        for record in (*changes.joined, *(change.now for change in changes.changed)):
            if record.cluster_id != self.setting.cluster_id:
                self._records[record.cluster_id] = record


class NixlMember(Rival):
    """NIXL over UCX."""

    def start(self) -> dict[str, str]:
        from nixl_cu12._api import nixl_agent, nixl_agent_config

        config = nixl_agent_config(True, False, 0, backends=["UCX"])
        self._agent = nixl_agent(f"{self.setting.cluster_id}-{self.tag}", config)
        memories = [(each.ctypes.data, each.nbytes, 0, "") for each in (self.owned, self.sink)]
        self._agent.register_memory(memories, "DRAM")
        #: loaded, by whose it is
        self._known: dict[int, tuple[str, str]] = {}
        # a label has 256 characters at most
        text = base64.b64encode(self._agent.get_agent_metadata()).decode()
        return {f"nixl{at:06d}": text[at : at + 256] for at in range(0, len(text), 256)}

    def read(self, owner: Record, local: list[int], remote: list[int]) -> None:
        try:
            peer = self._reach(owner)
            state = self._transfer(peer, local, remote)
        except Exception as error:  # whatever its bindings raise
            self._forget(owner.cluster_id)
            raise Failed(type(error).__name__) from error
        if state != "DONE":
            self._forget(owner.cluster_id)
            raise Failed(f"NIXL {state}")

    def _transfer(self, peer: str, local: list[int], remote: list[int]) -> str:
        agent, until = self._agent, time.monotonic() + DEADLINE_S
        descs = [agent.get_xfer_descs(_nixl_columns(each), "DRAM") for each in (local, remote)]
        handle = agent.initialize_xfer("READ", *descs, peer)
        try:
            state = str(agent.transfer(handle))
            while state not in ("DONE", "ERR") and time.monotonic() < until:
                time.sleep(20e-6)
                state = str(agent.check_xfer_state(handle))
            return state
        finally:
            agent.release_xfer_handle(handle)

    def _reach(self, owner: Record) -> str:
        tag, name = self._known.get(owner.cluster_id, ("", ""))
        if tag != owner.labels["tag"]:
            self._forget(owner.cluster_id)
            parts = sorted(item for item in owner.labels.items() if item[0].startswith("nixl"))
            metadata = base64.b64decode("".join(text for _, text in parts))
            said = self._agent.add_remote_agent(metadata)
            name = said.decode() if isinstance(said, bytes) else str(said)
            self._known[owner.cluster_id] = owner.labels["tag"], name
        return name

    def _forget(self, cluster_id: int) -> None:
        _, name = self._known.pop(cluster_id, ("", ""))
        if name:
            self._agent.remove_remote_agent(name)


class MooncakeMember(Rival):
    """Mooncake's transfer engine over TCP."""

    def start(self) -> dict[str, str]:
        from mooncake.engine import TransferEngine

        self._engine = TransferEngine()
        if self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
            raise RuntimeError("Mooncake could not be initialised")
        for each in (self.owned, self.sink):
            if self._engine.register_memory(each.ctypes.data, each.nbytes):
                raise RuntimeError("Mooncake could not register the memory")
        return {"session": f"127.0.0.1:{self._engine.get_rpc_port()}"}

    def read(self, owner: Record, local: list[int], remote: list[int]) -> None:
        sizes = [_BLOCK_NBYTES] * len(local)
        said = self._engine.batch_transfer_sync_read(owner.labels["session"], local, remote, sizes)
        if said:
            raise Failed(f"Mooncake {said}")


MEMBERS: dict[str, type[Load]] = {"nixl": NixlMember, "mooncake": MooncakeMember}


def _addrs(base: int, blocks: Sequence[int]) -> list[int]:
    """Of these blocks in all tensors."""
    return [
        base + tensor * _TENSOR_NBYTES + block * _BLOCK_NBYTES
        for tensor in range(SHAPE[0])
        for block in blocks
    ]


def _nixl_columns(addrs: Sequence[int]) -> Any:
    columns = np.zeros((len(addrs), 3), np.uint64)
    columns[:, 0], columns[:, 1] = addrs, _BLOCK_NBYTES
    return columns
