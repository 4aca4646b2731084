"""Which congestion control a cache is sent with: the system's, unless it paces near hosts."""

from __future__ import annotations

import re
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
import two_hosts
from slow_cable import SlowCable
from two_hosts import CABLE, HOSTS, Hosts, control_congestion, lay_cable, set_up

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node

machines, apart = two_hosts.machines, two_hosts.apart

AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
#: 4 MiB of it are moved, in two streams
SHAPE = (4, 64, 32 * 1024)
BLOCKS = list(range(32))

pytestmark = pytest.mark.skipif(
    not AVAILABLE.exists() or "bbr" not in AVAILABLE.read_text().split(),
    reason="only BBR paces, and this kernel does not have it: modprobe tcp_bbr",
)


# -- run by the hosts ------------------------------------------------------------------------------


def start(node: Node, cluster_id: int, host: str, congestion: list[str]) -> int:
    """A cluster on that host, for which the system has a way of congestion control; the port."""
    control_congestion(node, host, *congestion)
    port = node.start(
        LLMRole.PROMPT if cluster_id == 1 else LLMRole.DECODER, cluster_id,
        listen_ip_info=f"{host}:0", transfer_threads=2, sync_kv_timeout=60_000,
    )  # fmt: skip
    node.blocks_cache(*SHAPE, seed=cluster_id, key=BlocksCacheKey(cluster_id, 0))
    return port


def pull(node: Node) -> None:
    cache = node.blocks_cache(*SHAPE)
    node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, BLOCKS, BLOCKS)


def senders(node: Node) -> list[str]:
    """The congestion control of each connection of this host that has sent a part of a cache."""
    listed = subprocess.run(["ss", "-tinOH"], check=True, capture_output=True, text=True).stdout
    sent = re.findall(r" (\w+) wscale:.* bytes_sent:(\d+)", listed)
    return [name for name, nbytes in sent if int(nbytes) >= 2**20]


# -- tests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("delay_s", "congestion", "used"),
    [
        (0, ["bbr"], "cubic"),
        (0, ["lock", "bbr"], "bbr"),
        (0, ["reno"], "reno"),
        (0.002, ["bbr"], "bbr"),
    ],
    ids=["near", "near-but-locked", "near-and-not-paced", "far"],
)
def test_a_near_host_is_sent_to_without_pacing(
    apart: Hosts, delay_s: float, congestion: list[str], used: str
) -> None:
    one, other = apart
    with ExitStack() as stack:
        lay(apart, delay_s, stack)
        port = one.call(start, 1, HOSTS[0], congestion)
        other.call(start, 2, HOSTS[1], congestion)
        assert other.call(Node.link, port, 1, 5000, host=HOSTS[0]) == LLMStatusCode.LLM_SUCCESS
        other.call(pull)
        assert set(one.call(senders)) == {used}  # a quick stream may have sent all
        for process in apart:
            process.call(Node.stop)


def lay(hosts: Hosts, delay_s: float, stack: ExitStack) -> None:
    """A cable between the hosts, which takes its time."""
    try:
        if delay_s:
            cable = SlowCable([process.pid for process in hosts], CABLE, delay_s)
            set_up(hosts)
            stack.enter_context(cable)
        else:
            lay_cable(hosts)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a cable needs veth, iproute2 and /dev/net/tun, and to be root: {error}")
