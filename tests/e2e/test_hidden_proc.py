"""Where /proc does not tell what it tells elsewhere: a service with ProcSubset=pid, a sandbox."""

from __future__ import annotations

import subprocess

import pytest
import two_hosts
from linked_pair import SUCCESS
from two_hosts import HOSTS, Hosts, unshare

from llm_datadist import BlocksCacheKey, LLMRole
from llm_datadist.testing.cluster import Node, NodeProcess

machines, apart, hosts = two_hosts.machines, two_hosts.apart, two_hosts.hosts

CLONE_NEWNS = 0x00020000
SHAPE = (2, 8, 64)


@pytest.mark.parametrize("hidden", ["/proc/sys/kernel/random", "/proc/sys"])
def test_links_of_one_host_are_made_and_used(hidden: str) -> None:
    with NodeProcess() as owner, NodeProcess() as reader:
        hide(owner, hidden)
        port = owner.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0")
        reader.call(Node.start, LLMRole.DECODER, 2)
        owner.call(publish)
        assert reader.call(Node.link, port, 1, 10_000) == SUCCESS
        reader.call(pull)
        assert reader.call(path_and_reason) == ("cma", "")


def test_other_hosts_are_linked_by_tcp_and_not_taken_for_this_one(hosts: Hosts) -> None:
    owner, reader = hosts
    hide(reader, "/proc/sys")
    port = owner.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info=f"{HOSTS[0]}:0")
    reader.call(Node.start, LLMRole.DECODER, 2)
    owner.call(publish)
    assert reader.call(Node.link, port, 1, 10_000, HOSTS[0]) == SUCCESS
    reader.call(pull)
    path, reason = reader.call(path_and_reason)
    assert path == "tcp"
    assert "another host, or in another network namespace" in reason


def hide(process: NodeProcess, folder: str) -> None:
    try:
        process.call(cover, folder)
    except OSError as error:
        pytest.skip(f"to hide a part of /proc needs the right to mount (root): {error}")


# -- run by the processes --


def cover(_: Node, folder: str) -> None:
    unshare(CLONE_NEWNS)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)


def publish(node: Node) -> None:
    node.blocks_cache(*SHAPE, seed=1, key=BlocksCacheKey(1, 0))


def pull(node: Node) -> None:
    cache = node.blocks_cache(*SHAPE)
    node.manager.pull_blocks(BlocksCacheKey(1, 0), cache, [1], [2])


def path_and_reason(node: Node) -> tuple[str, str]:
    (link,) = node.datadist.links()
    return link.path, link.path_reason
