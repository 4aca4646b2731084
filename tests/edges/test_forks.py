"""Forked children: what they may do with a cluster that they inherit, and that it harms nobody."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from edges.forking import in_child
from edges.user import KEY, OWNED, SHAPE, SMALL, SUCCESS, User, settings, start_owner
from llm_datadist import CacheDesc, DataType, LLMDataDist, LLMException, LLMRole
from llm_datadist.cpp import LlmDataDist, LlmRole
from llm_datadist.testing.cluster import Node
from soak.stage import Doing

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_datadist.testing.cluster import NodeProcess


def errors_of(calls: list[Callable[[], object]]) -> str:
    """What each call raises, a line each."""
    lines = []
    for call in calls:
        try:
            lines.append(f"returned {call()!r}")
        except (LLMException, RuntimeError) as error:
            lines.append(f"{type(error).__name__}: {error}")
    return "\n".join(lines)


def fork_and_call(node: Node, path: str, port: int) -> tuple[str, bool]:
    """What the calls raise in a child; whether the parent's next pull is right."""
    user = User(node, path, port)
    user.pull()
    datadist, manager = node.datadist, node.manager
    calls: list[Callable[[], object]] = [
        user.pull,
        user.push,
        user.copy,
        lambda: manager.unregister_cache(1),
        lambda: manager.register_blocks_cache(CacheDesc(1, [4, 64], DataType.DT_INT8), [4096]),
        lambda: node.link(port, 1),
        datadist.links,
        datadist.stats,
        lambda: datadist.cache_manager,
        lambda: datadist.switch_role(LLMRole.PROMPT),
    ]
    said = in_child(lambda: errors_of(calls))
    user.into[:] = 0
    user.pull()
    return said, bool((user.into == OWNED).all())


def test_calls_in_a_child_say_what_to_do_and_the_parent_goes_on(
    peer: NodeProcess, victim: NodeProcess, path: str
) -> None:
    said, is_right = victim.call(fork_and_call, path, peer.call(start_owner, path))
    lines = said.splitlines()
    assert len(lines) == 10
    assert [line for line in lines if "fork" not in line or "returned" in line] == []
    assert [line for line in lines if "initialise" not in line] == []
    assert is_right


def fork_other_faces(node: Node) -> tuple[str, str]:
    """The v1 mode, and the C++ interface."""
    datadist = LLMDataDist(LLMRole.PROMPT, 5)
    datadist.init({"llm.listenIpInfo": "127.0.0.1:0"})
    kv_caches = datadist.kv_cache_manager
    desc = CacheDesc(1, [4, 64], DataType.DT_INT8)
    v1 = in_child(lambda: errors_of([lambda: kv_caches.allocate_cache(desc)]))
    datadist.finalize()
    cluster = LlmDataDist(6, LlmRole.kPrompt)
    assert cluster.Initialize({"llm.DeviceId": "0"}) == 0
    never = LlmDataDist(7, LlmRole.kPrompt).UnlinkLlmClusters([])
    cpp = in_child(lambda: repr((cluster.UnlinkLlmClusters([]) == never, cluster.listen_endpoint)))
    cluster.Finalize()
    return v1, cpp


def test_the_v1_mode_and_the_cpp_interface_refuse_in_a_child(victim: NodeProcess) -> None:
    v1, cpp = victim.call(fork_other_faces)
    assert "fork" in v1
    assert "returned" not in v1
    assert cpp == "(True, None)", "as one that was never initialised"


def fork_and_begin_anew(node: Node, path: str, port: int) -> tuple[str, bool]:
    user = User(node, path, port, shape=SMALL)
    user.pull()

    def anew() -> str:
        mine = Node()
        mine.start(LLMRole.DECODER, 3, **settings(path))
        assert mine.link(port, 1) == SUCCESS
        cache, blocks = mine.blocks_cache(*SMALL), list(range(SMALL[1]))
        mine.manager.pull_blocks(KEY, cache, blocks, blocks)
        is_right = bool((mine.arrays[cache.cache_id] == OWNED).all())
        mine.stop()
        return f"pulled: {is_right}"

    said = in_child(anew)
    user.pull()
    return said, [link.cluster_id for link in node.datadist.links()] == [1]


def test_a_child_may_initialise_and_link_to_the_peer_of_its_parent(
    peer: NodeProcess, victim: NodeProcess, path: str
) -> None:
    port = peer.call(start_owner, path, shape=SMALL)
    assert victim.call(fork_and_begin_anew, path, port) == ("pulled: True", True)


def fork_while_threads_pull(
    node: Node, path: str, port: int, count: int, shape: tuple[int, int, int] = SHAPE
) -> list[str]:
    """Another thread forks; what a child, or the parent, found wrong."""
    user = User(node, path, port, shape=shape)
    ended, wrong = threading.Event(), []

    def pull() -> None:
        cache = node.blocks_cache(*shape)
        array, blocks = node.arrays[cache.cache_id], list(range(shape[1]))
        while not ended.is_set():
            array[:] = 0
            user.manager.pull_blocks(KEY, cache, blocks, blocks)
            if not (array == OWNED).all():
                wrong.append("a pull of the parent succeeded with other bytes")

    def fork() -> None:
        for _ in range(count):
            said = in_child(lambda: errors_of([user.pull]))
            if "fork" not in said:
                wrong.append(said)

    pulling = [Doing(pull) for _ in range(3)]
    forking = Doing(fork)
    try:
        forking.result(60)
    finally:
        ended.set()
    for thread in pulling:
        thread.result()
    return wrong


def test_a_fork_while_other_threads_pull_harms_neither_end(
    peer: NodeProcess, victim: NodeProcess, path: str
) -> None:
    port = peer.call(start_owner, path)
    assert victim.call(fork_while_threads_pull, path, port, 20) == []
