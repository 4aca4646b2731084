"""Other libraries as contestants, where they are installed: NIXL (UCX) and Mooncake."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llm_datadist.cli.bench.ceiling import wait_for_end
from llm_datadist.cli.bench.contestant import Job, Puller
from llm_datadist.cli.bench.failure import BenchError
from llm_datadist.cli.bench.memory import CacheMemory

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from llm_datadist.cli.bench.workload import Blocks

#: Mooncake's queue refuses larger batches
_MOONCAKE_BATCH = 512


class Nixl(Puller):
    """NIXL reads: prepare, post, wait. UCX_TLS says by which transport."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, _own_nixl)
        metadata, base = self.owner.greeting
        self._agent = _nixl_agent("reader", self.memory, job.threads)
        self._peer = self._agent.add_remote_agent(metadata)
        src, dst = job.workload.blocks()
        self._local = job.workload.vectors(self.memory.addr, dst)
        self._remote = job.workload.vectors(base, src)
        self.detail = "UCX"

    def move(self) -> None:
        agent = self._agent
        local = agent.get_xfer_descs(_descriptors(self._local), "DRAM")
        remote = agent.get_xfer_descs(_descriptors(self._remote), "DRAM")
        handle = agent.initialize_xfer("READ", local, remote, self._peer)
        state = agent.transfer(handle)
        while state not in ("DONE", "ERR"):
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise BenchError("NIXL's transfer failed")
        agent.release_xfer_handle(handle)


class Mooncake(Puller):
    """Mooncake's transfer engine over TCP."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, _own_mooncake)
        self._session, base = self.owner.greeting
        self._engine = _mooncake_engine(self.memory)
        src, dst = job.workload.blocks()
        self._local = job.workload.vectors(self.memory.addr, dst)
        self._remote = job.workload.vectors(base, src)
        self.detail = "tcp"

    def move(self) -> None:
        local, nbytes = self._local.T.tolist()
        remote = self._remote[:, 0].tolist()
        for start in range(0, len(local), _MOONCAKE_BATCH):
            batch = slice(start, start + _MOONCAKE_BATCH)
            if self._engine.batch_transfer_sync_read(
                self._session, local[batch], remote[batch], nbytes[batch]
            ):
                raise BenchError("Mooncake's transfer failed")


def _descriptors(vectors: Blocks) -> Blocks:
    descriptors = np.zeros((len(vectors), 3), dtype=np.uint64)
    descriptors[:, :2] = vectors
    return descriptors


def _nixl_agent(name: str, memory: CacheMemory, threads: int) -> Any:  # noqa: ANN401  # NIXL has no types
    from nixl_cu12._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(
        name, nixl_agent_config(True, False, 0, backends=["UCX"], num_threads=threads)
    )
    agent.register_memory([(memory.addr, memory.nbytes, 0, "")], "DRAM")
    return agent


def _own_nixl(pipe: Connection, job: Job) -> None:
    memory = CacheMemory(job.workload)
    memory.fill()
    agent = _nixl_agent("owner", memory, job.threads)
    pipe.send((agent.get_agent_metadata(), memory.addr))
    wait_for_end(pipe)


def _mooncake_engine(memory: CacheMemory) -> Any:  # noqa: ANN401  # Mooncake has no types
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
        raise BenchError("Mooncake could not be initialised")
    if engine.register_memory(memory.addr, memory.nbytes):
        raise BenchError("Mooncake could not register the memory")
    return engine


def _own_mooncake(pipe: Connection, job: Job) -> None:
    memory = CacheMemory(job.workload)
    memory.fill()
    engine = _mooncake_engine(memory)
    pipe.send((f"127.0.0.1:{engine.get_rpc_port()}", memory.addr))
    wait_for_end(pipe)
