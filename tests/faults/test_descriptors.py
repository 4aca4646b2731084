"""Descriptors run out, at any point of a call: a clear error in time, and all well afterwards."""

from __future__ import annotations

import os
import resource
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from scarcity import (
    GIVEN_OUT,
    SUCCESS,
    TIMEOUT_MS,
    descriptors,
    in_time,
    publish,
    pull,
    settings,
    start_owner,
    start_puller,
)

from llm_datadist import LLMException, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """So many descriptors can be opened, in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0)]
    while len(taken) < 64:  # so that the limit is a matter of count, whatever gaps there are
        taken.append(os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[-1] + 1, hard))
    try:
        for fd in [taken.pop() for _ in range(count)]:
            os.close(fd)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


def link_with(node: Node, port: int, left: int) -> tuple[LLMStatusCode, LLMStatusCode]:
    """The statuses of a link and of a pull with so many descriptors."""
    with descriptors_left(left):
        with in_time():
            linked = node.link(port, 1, TIMEOUT_MS)
        with in_time():
            return linked, pull(node)


def start_with(node: Node, left: int) -> str:
    """What `init` ends with; the text of its error."""
    with descriptors_left(left):
        try:
            start_puller(node, "tcp", listen_ip_info="127.0.0.1:0")
        except LLMException as error:
            return f"{error.status_code.name}: {error}"
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        return "LLM_SUCCESS"


def test_a_cluster_without_descriptors_does_not_start_and_says_why(victim: NodeProcess) -> None:
    assert victim.call(start_with, 40) == "LLM_SUCCESS"  # imports what it imports
    victim.call(Node.stop)
    before = victim.call(descriptors)
    texts = []
    for left in range(6):
        texts.append(victim.call(start_with, left))
        victim.call(Node.stop)
        assert victim.call(descriptors) == before, (left, texts)
    assert texts[0].startswith("LLM_FAILED: "), texts
    assert "Too many open files" in texts[0]
    assert {text.split(":")[0] for text in texts} <= {"LLM_FAILED", "LLM_SUCCESS"}, texts
    assert victim.call(start_with, 40) == "LLM_SUCCESS"


@pytest.mark.parametrize("is_caller", [True, False], ids=["caller", "listener"])
def test_linking_and_pulling_without_descriptors_fails_in_time_and_recovers(
    node: Node, victim: NodeProcess, path: str, is_caller: bool
) -> None:
    """With one descriptor more each time, until there are enough; the other end has plenty."""
    if is_caller:
        node.start(LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings(path))
        publish(node)
        endpoint = node.datadist.listen_endpoint
        assert endpoint is not None
        port = endpoint.port
        victim.call(start_puller, path)
    else:
        port = start_owner(victim, path)
        start_puller(node, path)
    before = victim.call(descriptors)
    outcomes = []
    for left in range(10):
        if is_caller:
            outcomes.append(victim.call(link_with, port, left))
        else:
            victim.call(leave_descriptors, left)
            with in_time():
                linked = node.link(port, 1, TIMEOUT_MS)
            with in_time():
                outcomes.append((linked, pull(node)))
            victim.call(have_descriptors)
        if is_caller:
            victim.call(Node.unlink, port, 1, force=True)
        else:
            node.unlink(port, 1, force=True)
        assert eventually(lambda: victim.call(descriptors) <= before), (left, outcomes)
    statuses = {status for outcome in outcomes for status in outcome}
    assert statuses <= {SUCCESS, *GIVEN_OUT}, outcomes
    assert outcomes[0][0] != SUCCESS
    assert outcomes[0][1] == LLMStatusCode.LLM_NOT_YET_LINK
    assert outcomes[-1] == (SUCCESS, SUCCESS), outcomes
    if is_caller:
        assert victim.call(Node.link, port, 1) == SUCCESS
        assert victim.call(pull) == SUCCESS
    else:
        assert node.link(port, 1) == SUCCESS
        assert pull(node) == SUCCESS


_left: list[Any] = []


def leave_descriptors(node: Node, left: int) -> None:
    _left.append(descriptors_left(left))
    _left[-1].__enter__()


def have_descriptors(node: Node) -> None:
    _left.pop().__exit__(None, None, None)


def test_pulling_and_registering_without_descriptors(
    peer: NodeProcess, victim: NodeProcess
) -> None:
    """The link was made before; each further stream needs one more."""
    port = start_owner(peer, "tcp")
    victim.call(start_puller, "tcp")
    assert victim.call(Node.link, port, 1) == SUCCESS
    for left in (0, 1, 2, 8, 0):
        status, registered = victim.call(pull_with, left)
        assert status in {SUCCESS, *GIVEN_OUT}
        assert registered == SUCCESS, "which needs no descriptor"
        assert left < 8 or status == SUCCESS
    assert victim.call(pull) == SUCCESS
    assert len(victim.call(linked_ids)) == 1, "the link outlived it"


def linked_ids(node: Node) -> list[int]:
    return [link.cluster_id for link in node.datadist.links()]


def pull_with(node: Node, left: int) -> tuple[LLMStatusCode, LLMStatusCode]:
    with descriptors_left(left):
        with in_time():
            status = pull(node)
        try:
            cache = node.blocks_cache(1, 2, 64)
        except LLMException as error:
            return status, error.status_code
        node.manager.unregister_cache(cache.cache_id)
        return status, SUCCESS
