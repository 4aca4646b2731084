"""LLMDataDist's own members: before init, in either mode, with arguments that are none. Spec 5."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import v1_cluster

from llm_datadist import (
    LLMClusterInfo,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.testing.cluster import Node, NodeProcess, cluster_info
from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from v1_cluster import Pair

decoder = v1_cluster.decoder

SUCCESS = LLMStatusCode.LLM_SUCCESS
INVALID = LLMStatusCode.LLM_PARAM_INVALID
NOT_LINKED = LLMStatusCode.LLM_NOT_YET_LINK
LINK_FAILED = LLMStatusCode.LLM_LINK_FAILED
MANAGER = {"llm.EnableCacheManager": "1"}
TABLE = '{"server_list":[{"device":[{}]}]}'
#: nobody listens there
DISCARD_PORT = 9


@pytest.fixture
def datadist() -> Iterator[LLMDataDist]:
    """Not initialised yet; finalized after the test."""
    datadist = LLMDataDist(LLMRole.DECODER, 2)
    yield datadist
    datadist.finalize()


def refusal(call: Callable[..., object], *args: object, says: str = "") -> LLMStatusCode:
    with pytest.raises(LLMException, match=says) as error:
        call(*args)
    return error.value.status_code


# -- before and after ------------------------------------------------------------------------------

MEMBERS: dict[str, Callable[[LLMDataDist], object]] = {
    "cache_manager": lambda d: d.cache_manager,
    "kv_cache_manager": lambda d: d.kv_cache_manager,
    "listen_endpoint": lambda d: d.listen_endpoint,
    "links": lambda d: d.links(),
    "pools": lambda d: d.pools(),
    "link_clusters": lambda d: d.link_clusters([cluster_info(DISCARD_PORT, 1)]),
    "unlink_clusters": lambda d: d.unlink_clusters([cluster_info(DISCARD_PORT, 1)]),
    "link": lambda d: d.link("kv", {1: 0, 2: 1}, TABLE),
    "unlink": lambda d: d.unlink(1),
    "query_register_mem_status": lambda d: d.query_register_mem_status(1),
    "switch_role": lambda d: d.switch_role(LLMRole.PROMPT),
    "check_link_status": lambda d: d.check_link_status(1),
}


@pytest.mark.shows("error.2")
@pytest.mark.parametrize("name", MEMBERS)
def test_nothing_can_be_used_before_init_or_after_finalize(
    datadist: LLMDataDist, name: str
) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="llm datadist is not initialized") as error:
            MEMBERS[name](datadist)
        assert not isinstance(error.value, LLMException)
        datadist.init(MANAGER)
        datadist.finalize()


@pytest.mark.shows("datadist.cluster_id", "relies.7")
@pytest.mark.parametrize("cluster_id", [0, 2**63, 2**64 - 1])
def test_the_cluster_id_can_be_asked_for_at_any_time(cluster_id: int) -> None:
    datadist = LLMDataDist(LLMRole.MIX, cluster_id)
    assert datadist.cluster_id == cluster_id
    datadist.init(MANAGER)
    assert datadist.cluster_id == cluster_id
    datadist.finalize()
    assert datadist.cluster_id == cluster_id


# -- the two modes ---------------------------------------------------------------------------------


@pytest.mark.shows("datadist.cache_manager", "datadist.kv_cache_manager", "error.11")
def test_with_the_cache_manager_there_is_nothing_of_the_v1_mode(datadist: LLMDataDist) -> None:
    datadist.init(MANAGER)
    assert datadist.cache_manager is datadist.cache_manager
    assert refusal(MEMBERS["kv_cache_manager"], datadist, says="v1 mode") is INVALID
    assert refusal(datadist.check_link_status, 1, says="v1 mode") is INVALID


@pytest.mark.shows("datadist.cache_manager", "datadist.kv_cache_manager", "error.11")
@pytest.mark.parametrize("options", [{}, {"llm.EnableCacheManager": "0"}], ids=str)
def test_in_the_v1_mode_there_is_nothing_of_the_cache_manager(
    datadist: LLMDataDist, options: dict[str, str]
) -> None:
    datadist.init(options)
    assert datadist.kv_cache_manager is datadist.kv_cache_manager
    for name in ("cache_manager", "link", "unlink", "query_register_mem_status"):
        assert refusal(MEMBERS[name], datadist, says="enable_cache_manager") is INVALID


@pytest.mark.shows("datadist.check_link_status")
def test_in_the_v1_mode_the_status_of_a_link_can_be_checked(decoder: Pair) -> None:
    datadist = decoder.node.datadist
    (link,) = datadist.links()
    assert link.endpoint is not None
    datadist.check_link_status(1)
    decoder.peer.call(check_link, 2)
    assert refusal(datadist.check_link_status, 3, says="cluster 3") is NOT_LINKED
    assert decoder.node.unlink(link.endpoint.port, 1) is SUCCESS
    assert refusal(datadist.check_link_status, 1, says="cluster 1") is NOT_LINKED
    assert eventually(lambda: not decoder.peer.call(live_links))
    with pytest.raises(LLMException, match="cluster 2"):
        decoder.peer.call(check_link, 2)


def check_link(node: Node, cluster_id: int) -> None:
    node.datadist.check_link_status(cluster_id)


def live_links(node: Node) -> int:
    return len(node.datadist.links())


@pytest.mark.shows("datadist.check_link_status")
@pytest.mark.parametrize(
    ("cluster_id", "expected"),
    [(None, TypeError), ("1", TypeError), (True, TypeError), (-1, ValueError), (2**64, ValueError)],
)
def test_the_status_is_asked_of_a_cluster_id(
    datadist: LLMDataDist, cluster_id: Any, expected: type[Exception]
) -> None:
    datadist.init({})
    with pytest.raises(expected, match="remote_cluster_id"):
        datadist.check_link_status(cluster_id)


# -- the arguments of link_clusters and unlink_clusters --------------------------------------------


@pytest.fixture(params=["link_clusters", "unlink_clusters"])
def call(request: pytest.FixtureRequest, datadist: LLMDataDist) -> Callable[..., object]:
    """Either of the two; both check alike."""
    datadist.init(MANAGER)
    method: Callable[..., object] = getattr(datadist, request.param)
    return method


@pytest.mark.shows("error.12")
@pytest.mark.parametrize("timeout", [0, -1, -(2**31)])
def test_a_timeout_is_greater_than_zero(call: Callable[..., object], timeout: int) -> None:
    assert refusal(call, [cluster_info(DISCARD_PORT, 1)], timeout, says="timeout") is INVALID
    assert refusal(call, None, timeout, says="timeout") is INVALID, "it is checked first"


@pytest.mark.shows("error.12")
@pytest.mark.parametrize(
    ("timeout", "expected"),
    [
        (None, TypeError),
        ("3000", TypeError),
        (3000.0, TypeError),
        (True, TypeError),
        (2**31, ValueError),
        (-(2**31) - 1, ValueError),
    ],
)
def test_a_timeout_is_an_int32(
    call: Callable[..., object], timeout: object, expected: type[Exception]
) -> None:
    with pytest.raises(expected, match="timeout"):
        call([cluster_info(DISCARD_PORT, 1)], timeout)


@pytest.mark.shows("error.12")
def test_the_longest_timeout_is_one(call: Callable[..., Any]) -> None:
    status, statuses = call([cluster_info(DISCARD_PORT, 1)], 2**31 - 1)
    assert [status] == statuses
    assert status in (LINK_FAILED, LLMStatusCode.LLM_UNLINK_FAILED)


@pytest.mark.shows("error.13")
@pytest.mark.parametrize(
    "clusters",
    [None, 1, "1", {}, cluster_info(DISCARD_PORT, 1), [1], [None], [cluster_info(1, 1), "2"]],
    ids=lambda clusters: type(clusters).__name__,
)
def test_clusters_are_a_list_of_infos(call: Callable[..., object], clusters: object) -> None:
    with pytest.raises(TypeError, match=r"clusters|None"):
        call(clusters)


@pytest.mark.shows("error.16", "datadist.link_clusters", "datadist.unlink_clusters")
@pytest.mark.parametrize("clusters", [[], ()], ids=str)
def test_no_clusters_are_invalid(call: Callable[..., object], clusters: object) -> None:
    assert call(clusters) == (INVALID, [])


def info_without_local_address(port: int) -> LLMClusterInfo:
    info = LLMClusterInfo()
    info.remote_cluster_id = 1
    info.append_remote_ip_info("127.0.0.1", port)
    return info


@pytest.mark.shows("error.14")
@pytest.mark.parametrize("resources", [None, ""])
def test_without_resources_a_local_address_is_needed_to_link(
    node: Node, peer: NodeProcess, resources: str | None
) -> None:
    port = peer.call(
        Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", local_comm_res=resources
    )
    node.start(LLMRole.DECODER, 2, local_comm_res=resources)
    infos = [cluster_info(port, 1), info_without_local_address(port)]
    says = "local_ip_info_list is empty"
    assert refusal(node.datadist.link_clusters, infos, says=says) is INVALID
    assert node.datadist.links() == [], "of none of the call's clusters"
    assert node.link(port, 1) is SUCCESS
    assert node.datadist.unlink_clusters(infos[1:]) == (SUCCESS, [SUCCESS])


@pytest.mark.shows("error.14")
def test_with_resources_no_local_address_is_needed(node: Node, peer: NodeProcess) -> None:
    settings = {"local_comm_res": '{"version": "1.3"}'}
    port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings)
    node.start(LLMRole.DECODER, 2, **settings)
    infos = [info_without_local_address(port)]
    assert node.datadist.link_clusters(infos) == (SUCCESS, [SUCCESS])


@pytest.mark.shows("error.15")
@pytest.mark.parametrize("force", [False, True])
def test_unlinking_needs_a_cluster_id(datadist: LLMDataDist, force: bool) -> None:
    datadist.init(MANAGER)
    with pytest.raises(TypeError, match="remote_cluster_id"):
        datadist.unlink_clusters([cluster_info(DISCARD_PORT, None)], force=force)


@pytest.mark.shows("error.15")
def test_linking_needs_no_cluster_id(datadist: LLMDataDist) -> None:
    datadist.init(MANAGER)
    infos = [cluster_info(DISCARD_PORT, None)]
    assert datadist.link_clusters(infos) == (LINK_FAILED, [LINK_FAILED])


@pytest.mark.shows("error.20")
@pytest.mark.parametrize("force", [None, 0, 1, "True"])
def test_force_is_a_bool(datadist: LLMDataDist, force: Any) -> None:
    datadist.init(MANAGER)
    with pytest.raises(TypeError, match="force"):
        datadist.unlink_clusters([cluster_info(DISCARD_PORT, 1)], 3000, force)
