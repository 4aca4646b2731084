"""How a forked child ends, and how its parent does while it lives on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edges.user import OWNED, SMALL, SUCCESS, User, settings, start_owner
from llm_datadist import LLMRole
from llm_datadist.testing.timing import eventually, takes_at_most
from llm_datadist.transport.nixl_agent import package
from soak.stage import Doing

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node, NodeProcess

SOON_S = 2.0
needs_nixl = pytest.mark.skipif(package() is None, reason="NIXL is not installed")


def start_and_leave_a_child(node: Node, path: str) -> tuple[int, int]:
    """The port, and a child that lives on."""
    port = start_owner(node, path, shape=SMALL)
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    return port, child


@pytest.mark.parametrize("path", ["cma", "tcp", pytest.param("nixl", marks=needs_nixl)])
def test_the_death_of_the_parent_is_seen_and_its_port_is_free_while_the_child_lives(
    node: Node, peer: NodeProcess, victim: NodeProcess, path: str
) -> None:
    port, child = victim.call(start_and_leave_a_child, path)
    try:
        user = User(node, path, port, shape=SMALL)
        user.pull()
        victim.kill()
        assert eventually(lambda: not node.datadist.links(), SOON_S)
        assert peer.call(start_owner, path, shape=SMALL, port=port) == port
        assert node.link(port, 1) == SUCCESS
        user.pull()
        assert np.all(user.into == OWNED)
        os.kill(child, 0)  # it has been there all the time
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def link_and_fork_meanwhile(node: Node, path: str, port: int) -> list[int]:
    """Links while children are forked one after the other, each of which lives on."""
    node.start(LLMRole.DECODER, 3, **settings(path))
    linking = Doing(lambda: node.link(port, 1))
    children = []
    while linking.is_alive():
        child = os.fork()
        if not child:
            signal.pause()
            os._exit(0)
        children.append(child)
    assert linking.result(10) == SUCCESS
    return children


def test_children_that_are_forked_while_it_links_do_not_hide_the_death_of_the_parent(
    node: Node, victim: NodeProcess, path: str
) -> None:
    port = start_owner(node, path, shape=SMALL)
    children = victim.call(link_and_fork_meanwhile, path, port)
    try:
        assert len(node.datadist.links()) == 1
        victim.kill()
        assert eventually(lambda: not node.datadist.links(), SOON_S)
        for child in children:
            os.kill(child, 0)
    finally:
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


PROGRAM = """
    import os, sys, threading
    from llm_datadist import LLMConfig, LLMDataDist, LLMRole

    config = LLMConfig()
    config.enable_cache_manager = True
    config.listen_ip_info = "127.0.0.1:0"
    datadist = LLMDataDist(LLMRole.PROMPT, 1)
    datadist.init(config.generate_options())
    child = os.fork()
    if not child:
        {end}
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert datadist.listen_endpoint.port
    datadist.finalize()
"""


@pytest.mark.parametrize("end", ["sys.exit(7)", "os._exit(7)", "datadist.finalize(); sys.exit(7)"])
def test_a_child_ends_at_once_however_it_leaves(end: str) -> None:
    program = textwrap.dedent(PROGRAM.format(end=end))
    with takes_at_most(10):
        run = subprocess.run([sys.executable, "-c", program], timeout=30, capture_output=True)
    assert (run.returncode, run.stderr.decode()) == (0, "")
