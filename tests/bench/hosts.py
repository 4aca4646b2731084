"""Throughput between two hosts: this library, iperf3 and sockets with as many streams, and NIXL.

    python tests/bench/hosts.py --streams 1 --streams 2 --rounds 9

The hosts are network namespaces on this machine, joined by a pair of virtual interfaces. In each
round each contestant moves bytes for a second; the ratios are medians over the rounds. iperf3 sends
one small buffer over and over; the others move scattered blocks of a paged cache, of which every
byte is verified at first. Needs root and iperf3; NIXL takes part where nixl_cu12 is installed. How
TCP paces itself decides much: `--congestion cubic` (or bbr, ...) sets it for all.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.cli.bench.ours import register
from llm_datadist.cli.bench.rivals import answer, ask, in_threads
from llm_datadist.cli.bench.workload import SHAPES, CacheMemory
from llm_datadist.testing.cluster import Node, NodeProcess

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from two_hosts import CABLE, HOSTS, control_congestion, enter_host, lay_cable, leave_host, unshare

if TYPE_CHECKING:
    from collections.abc import Sequence

#: half as much of the shared workload: 256 MiB in scattered blocks of 32 KiB
WORKLOAD = replace(SHAPES["llama3-8b"], num_blocks=256, num_moved=128)
IPERF_PORT = 5201
#: how long each moves bytes in its turn: what happens in a tenth of that says little here
TURN_S = 1.0
CLONE_NEWNS = 0x20000
CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")
#: what a process of a contestant has
held: dict[str, Any] = {}


class Contestant(Protocol):
    name: str

    def bytes_per_s(self) -> float:
        """Over one turn."""


class Iperf:
    """iperf3, from the owner's host to the reader's."""

    name = "iperf3"

    def __init__(self, pids: Sequence[int], streams: int, stack: ExitStack) -> None:
        owner, reader = ([f"--net=/proc/{pid}/ns/net", "iperf3"] for pid in pids)
        server = ["nsenter", *owner, "--server", "--port", str(IPERF_PORT), "--forceflush"]
        process = stack.enter_context(subprocess.Popen(server, stdout=subprocess.PIPE, text=True))
        stack.callback(process.kill)
        assert process.stdout is not None
        while "listening" not in process.stdout.readline():
            pass
        threading.Thread(target=process.stdout.read, daemon=True).start()  # what else it says
        self._client = [
            *("nsenter", *reader, "--client", HOSTS[0], "--port", str(IPERF_PORT), "--reverse"),
            *("--parallel", str(streams), "--time", f"{TURN_S:.0f}", "--json"),
        ]

    def bytes_per_s(self) -> float:
        done = subprocess.run(self._client, check=True, capture_output=True, text=True)
        return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 8


class Pullers:
    """Two processes of a contestant, which stand still when it is not its turn."""

    def __init__(self, pids: Sequence[int], stack: ExitStack) -> None:
        self.owner, self.reader = (stack.enter_context(NodeProcess()) for _ in pids)
        for process, pid in zip((self.owner, self.reader), pids, strict=True):
            process.call(take_part, pid)
        self.owner.call(fill)

    def verify(self) -> None:
        self.move()
        if not self.reader.call(has_arrived):
            raise SystemExit(f"{type(self).__name__} did not move the bytes that it was asked to")
        self._pause()

    def bytes_per_s(self) -> float:
        for process in (self.owner, self.reader):
            process.resume()
        self.move()  # the caches are cold
        seconds: list[float] = []
        while sum(seconds) < TURN_S:
            seconds.append(self.move())
        self._pause()
        return WORKLOAD.moved_nbytes * len(seconds) / sum(seconds)

    def move(self) -> float:
        """The seconds that it took."""
        raise NotImplementedError

    def _pause(self) -> None:
        for process in (self.owner, self.reader):
            process.pause()


class Ours(Pullers):
    """`pull_blocks`, in remote-accessible mode."""

    name = "llm_datadist"

    def __init__(self, pids: Sequence[int], streams: int, stack: ExitStack) -> None:
        super().__init__(pids, stack)
        port = self.owner.call(start, LLMRole.PROMPT, 1, streams, f"{HOSTS[0]}:0")
        self.reader.call(start, LLMRole.DECODER, 2, streams, "")
        if self.reader.call(Node.link, port, 1, host=HOSTS[0]) != LLMStatusCode.LLM_SUCCESS:
            raise SystemExit("the clusters could not be linked")
        self.verify()

    def move(self) -> float:
        return self.reader.call(pull)


class Sockets(Pullers):
    """The same memory by bare connections."""

    name = "plain sockets"

    def __init__(self, pids: Sequence[int], streams: int, stack: ExitStack) -> None:
        super().__init__(pids, stack)
        address, base = self.owner.call(listen_for_sockets)
        self.reader.call(open_sockets, address, base, streams)
        self.owner.call(accept_sockets, streams)
        self.verify()

    def move(self) -> float:
        return self.reader.call(read_by_sockets)


class Nixl(Pullers):
    """NIXL reads by UCX over TCP."""

    def __init__(self, pids: Sequence[int], threads: int, stack: ExitStack) -> None:
        self.name = f"nixl x{threads}" if threads else "nixl"
        super().__init__(pids, stack)
        metadata, addr = self.owner.call(make_agent, "owner", threads)
        self.reader.call(make_agent, "reader", threads)
        self.reader.call(meet, metadata, addr)
        self.verify()

    def move(self) -> float:
        return self.reader.call(read_by_nixl)


# -- run by the contestants ------------------------------------------------------------------------


def take_part(node: Node, pid: int) -> None:
    """On the host of that process, with memory for a cache."""
    enter_host(pid)
    os.environ.update(UCX_TLS="tcp,self", UCX_NET_DEVICES=CABLE, NIXL_LOG_LEVEL="ERROR")
    held["memory"] = CacheMemory(WORKLOAD)


def fill(node: Node) -> None:
    held["memory"].fill()


def has_arrived(node: Node) -> bool:
    return bool(held["memory"].has_arrived())


def start(node: Node, role: LLMRole, cluster_id: int, streams: int, listen: str) -> int:
    settings = {"transfer_path": "tcp", "transfer_threads": streams, "sync_kv_timeout": 60_000}
    port = node.start(
        role, cluster_id, listen_ip_info=listen, enable_remote_cache_accessible=True, **settings
    )
    held["cache"] = register(node.datadist, WORKLOAD, held["memory"], as_rows=False)
    held["blocks"] = [blocks.tolist() for blocks in WORKLOAD.blocks()]
    return port


def pull(node: Node) -> float:
    begun = time.perf_counter()
    node.manager.pull_blocks(BlocksCacheKey(1, 0), held["cache"], *held["blocks"])
    return time.perf_counter() - begun


def listen_for_sockets(node: Node) -> tuple[tuple[str, int], int]:
    held["server"] = socket.create_server((HOSTS[0], 0), backlog=16)
    return held["server"].getsockname(), held["memory"].addr


def accept_sockets(node: Node, streams: int) -> None:
    for _ in range(streams):
        answer(held["server"])


def open_sockets(node: Node, address: tuple[str, int], base: int, streams: int) -> None:
    held["sockets"] = [socket.create_connection(address) for _ in range(streams)]
    src, dst = WORKLOAD.blocks()
    held["segments"] = WORKLOAD.vectors(base, src), WORKLOAD.vectors(held["memory"].addr, dst)


def read_by_sockets(node: Node) -> float:
    src, dst = held["segments"]
    begun = time.perf_counter()
    in_threads(
        len(held["sockets"]), len(src),
        lambda index, *part: ask(held["sockets"][index], src[slice(*part)], dst[slice(*part)]),
    )  # fmt: skip
    return time.perf_counter() - begun


def make_agent(node: Node, name: str, threads: int) -> tuple[bytes, int]:
    from nixl_cu12._api import nixl_agent, nixl_agent_config

    unshare(CLONE_NEWNS)
    for mount in (["--make-rprivate", "/"], ["--types", "sysfs", "sysfs", "/sys"]):
        subprocess.run(["mount", *mount], check=True)  # UCX looks for interfaces there
    config = nixl_agent_config(True, False, 0, backends=["UCX"], num_threads=threads)
    agent, memory = nixl_agent(name, config), held["memory"]
    agent.register_memory([(memory.addr, memory.nbytes, 0, "")], "DRAM")
    held["agent"] = agent
    return agent.get_agent_metadata(), memory.addr


def meet(node: Node, metadata: bytes, addr: int) -> None:
    held["peer"] = held["agent"].add_remote_agent(metadata)
    src, dst = WORKLOAD.blocks()
    for name, base, blocks in (("remote", addr, src), ("local", held["memory"].addr, dst)):
        vectors = WORKLOAD.vectors(base, blocks)
        held[name] = np.concatenate((vectors, np.zeros_like(vectors[:, :1])), axis=1)


def read_by_nixl(node: Node) -> float:
    agent, begun = held["agent"], time.perf_counter()
    local, remote = (agent.get_xfer_descs(held[name], "DRAM") for name in ("local", "remote"))
    handle = agent.initialize_xfer("READ", local, remote, held["peer"])
    state = agent.transfer(handle)
    while state not in ("DONE", "ERR"):
        state = agent.check_xfer_state(handle)
    seconds = time.perf_counter() - begun
    agent.release_xfer_handle(handle)
    if state != "DONE":
        raise SystemExit("NIXL's transfer failed")
    return seconds


# -- the table -------------------------------------------------------------------------------------


def compete(pids: Sequence[int], streams: int, rounds: int, table: Table) -> None:
    """Ours first, all of them in turn."""
    with ExitStack() as stack:
        contestants: list[Contestant] = [
            Ours(pids, streams, stack), Iperf(pids, streams, stack), Sockets(pids, streams, stack)
        ]  # fmt: skip
        if find_spec("nixl_cu12") is not None:
            contestants += [Nixl(pids, threads, stack) for threads in (0, streams)]
        turns = [[each.bytes_per_s() for each in contestants] for _ in range(rounds)]
    table.add_section()
    for index, contestant in enumerate(contestants):
        rate = statistics.median(rates[index] for rates in turns)
        ratio = statistics.median(rates[0] / rates[index] for rates in turns)
        table.add_row(
            str(streams), contestant.name, f"{rate / 1e9:.2f}", f"{ratio:.2f} x" if index else ""
        )


def main(
    streams: Annotated[list[int], typer.Option(help="may be given several times")] = [1, 2, 4],  # noqa: B006
    rounds: int = 7,
    congestion: Annotated[str, typer.Option(help="TCP's congestion control; this host's")] = "",
) -> None:
    if shutil.which("iperf3") is None:
        raise SystemExit("iperf3 is missing: apt-get install iperf3")
    congestion = congestion or CONGESTION.read_text().strip()
    table = Table(title=f"By TCP ({congestion}) between two hosts", title_justify="left")
    for heading in ("streams", "", "GB/s", "ours is"):
        table.add_column(heading, justify="right")
    with ExitStack() as stack:
        hosts = [stack.enter_context(NodeProcess()) for _ in HOSTS]
        for host in hosts:
            host.call(leave_host)
        lay_cable(hosts)
        for host, address in zip(hosts, HOSTS, strict=True):
            host.call(control_congestion, address, congestion)
        for count in streams:
            compete([host.pid for host in hosts], count, rounds, table)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
