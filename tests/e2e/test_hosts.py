"""Links between hosts, by link_clusters: IPv4 and IPv6, delay and loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import two_hosts
from linked_pair import add_blocks, array_of
from two_hosts import HOSTS, HOSTS_6, ip

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess, make_array
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Bytes

hosts = two_hosts.hosts

SUCCESS = LLMStatusCode.LLM_SUCCESS
KEY = BlocksCacheKey(1, 0)
SHAPE = (4, 32, 32 * 1024)


def shape_traffic(node: Node, *discipline: str) -> None:
    import subprocess

    subprocess.run(["tc", "qdisc", "add", "dev", "cable", "root", *discipline], check=True)


def pull(node: Node, src: list[int], dst: list[int]) -> Bytes:
    cache = node.blocks_cache(*SHAPE)
    node.manager.pull_blocks(KEY, cache, src, dst)
    return array_of(node, cache.cache_id)


def paths(node: Node) -> list[str]:
    return [link.path for link in node.datadist.links()]


def start_owner(process: NodeProcess, host: str, **settings: object) -> int:
    listen = f"[{host}]:0" if ":" in host else f"{host}:0"
    port = process.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info=listen, **settings)
    process.call(add_blocks, *SHAPE, seed=1, key=KEY)
    return port


@pytest.mark.shows("O34")
@pytest.mark.parametrize("host", [HOSTS[0], HOSTS_6[0]], ids=["IPv4", "IPv6"])
def test_blocks_are_pulled_from_another_host(hosts: list[NodeProcess], host: str) -> None:
    owner, reader = hosts
    port = start_owner(owner, host, transfer_path="tcp")
    reader.call(Node.start, LLMRole.DECODER, 2, transfer_path="tcp")
    assert reader.call(Node.link, port, 1, host=host) == SUCCESS
    assert reader.call(paths) == owner.call(paths) == ["tcp"]
    src, dst = [3, 9, 30], [0, 31, 7]
    got = reader.call(pull, src, dst)
    expected = np.zeros(SHAPE, np.uint8)
    expected[:, dst] = make_array(SHAPE, 1)[:, src]
    np.testing.assert_array_equal(got, expected)


def test_a_slow_and_lossy_network_is_no_error_within_the_deadline(
    hosts: list[NodeProcess],
) -> None:
    owner, reader = hosts
    for process in hosts:
        try:
            process.call(shape_traffic, "netem", "delay", "10ms", "loss", "1%")
        except Exception as error:  # the kernel may lack netem
            pytest.skip(f"delay and loss need tc and its kernel module: {error}")
    settings = {"transfer_path": "tcp", "sync_kv_timeout": 20_000}
    port = start_owner(owner, HOSTS[0], **settings)
    reader.call(Node.start, LLMRole.DECODER, 2, **settings)
    assert reader.call(Node.link, port, 1, 5000, host=HOSTS[0]) == SUCCESS
    with takes_at_most(24):
        got = reader.call(pull, list(range(32)), list(range(32)))
    np.testing.assert_array_equal(got, make_array(SHAPE, 1))


def test_an_address_that_leads_nowhere_is_a_timeout_in_time(hosts: list[NodeProcess]) -> None:
    reader = hosts[1]
    reader.call(ip, "route", "add", "192.0.2.0/24", "via", HOSTS[0])
    reader.call(Node.start, LLMRole.DECODER, 2, transfer_path="tcp")
    with takes_at_most(1.3):
        status = reader.call(Node.link, 26000, 1, 1000, host="192.0.2.1")
    assert status in (LLMStatusCode.LLM_TIMEOUT, LLMStatusCode.LLM_LINK_FAILED)
