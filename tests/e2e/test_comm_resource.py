"""Communication resources that the reference could not read are refused. Spec 5.1, 5.4, 7.1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cpp_cluster
import pytest
from cpp_cluster import LISTEN

from llm_datadist import LLMException, LLMRole, LLMStatusCode
from llm_datadist import cpp as c
from llm_datadist.testing.cluster import Node, NodeProcess, cluster_info

if TYPE_CHECKING:
    from cpp_cluster import MakeCluster

make_cluster = cpp_cluster.make_cluster

SUCCESS = LLMStatusCode.LLM_SUCCESS
INVALID = LLMStatusCode.LLM_PARAM_INVALID
UNREADABLE = [
    "{broken",
    "no JSON",
    "[]",
    "1",
    '{"version": "1.1"}',
    '{"version": "2.0"}',
    '{"version": 1.2}',
    '{"version": null}',
    '{"version": ["1.2"]}',
    "{" + " " * 65536 + "}",
    "[" * 65536,
]
READABLE = ["", "{}", *(f'{{"version": "{version}"}}' for version in ("1.0", "1.2", "1.3"))]
BOTH = ["local_comm_res", "global_resource_config"]
HIXL: dict[str, Any] = {"listen_ip_info": "127.0.0.1:0", "transfer_backend": "hixl"}


def ids(text: str) -> str:
    return text.strip()[:20] or "empty"


@pytest.mark.shows("resources.init")
@pytest.mark.parametrize("text", UNREADABLE, ids=ids)
@pytest.mark.parametrize("name", BOTH)
def test_with_a_backend_init_refuses_what_it_could_not_read(
    node: Node, name: str, text: str
) -> None:
    with pytest.raises(LLMException, match=r"^llm\.(LocalCommRes|GlobalResourceConfig) ") as error:
        node.start(LLMRole.MIX, 1, **HIXL, **{name: text})
    assert error.value.status_code is INVALID
    assert len(str(error.value)) < 300
    assert node.start(LLMRole.MIX, 1, **HIXL), "init may be called again"


@pytest.mark.shows("resources.init")
@pytest.mark.parametrize("text", READABLE, ids=ids)
@pytest.mark.parametrize("name", BOTH)
def test_with_a_backend_init_takes_what_it_could_read(node: Node, name: str, text: str) -> None:
    assert node.start(LLMRole.MIX, 1, **HIXL, **{name: text})


@pytest.mark.shows("resources.link")
@pytest.mark.parametrize("text", UNREADABLE, ids=ids)
def test_without_a_backend_linking_is_refused(node: Node, peer: NodeProcess, text: str) -> None:
    remote = {"listen_ip_info": "127.0.0.1:0", "enable_remote_cache_accessible": True}
    port = peer.call(Node.start, LLMRole.PROMPT, 1, **remote)
    node.start(LLMRole.DECODER, 2, local_comm_res=text)
    infos = [cluster_info(port, 1), cluster_info(port, 3)]
    assert node.datadist.link_clusters(infos) == (INVALID, [INVALID] * 2)
    assert node.datadist.links() == []
    assert node.datadist.unlink_clusters(infos[:1], force=True) == (SUCCESS, [SUCCESS])


@pytest.mark.shows("resources.link")
def test_without_a_backend_the_other_option_is_not_read(node: Node, peer: NodeProcess) -> None:
    port = peer.call(Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0")
    node.start(LLMRole.DECODER, 2, global_resource_config="no JSON")
    assert node.link(port, 1) is SUCCESS


@pytest.mark.shows("cpp.OPTION_LOCAL_COMM_RES", "cpp.OPTION_GLOBAL_RESOURCE_CONFIG")
@pytest.mark.parametrize("text", UNREADABLE, ids=ids)
@pytest.mark.parametrize("name", ["LOCAL_COMM_RES", "GLOBAL_RESOURCE_CONFIG"])
def test_with_a_backend_initialize_refuses_it(name: str, text: str) -> None:
    datadist = c.LlmDataDist(1, c.LlmRole.kMix)
    options = {c.OPTION_DEVICE_ID: "0", c.OPTION_LISTEN_IP_INFO: LISTEN}
    options |= {c.OPTION_TRANSFER_BACKEND: "hixl", getattr(c, f"OPTION_{name}"): text}
    assert datadist.Initialize(options) == c.LLM_PARAM_INVALID
    assert datadist.listen_endpoint is None


@pytest.mark.shows("cpp.OPTION_LOCAL_COMM_RES")
@pytest.mark.parametrize("text", UNREADABLE, ids=ids)
def test_without_a_backend_link_llm_clusters_refuses_it(
    make_cluster: MakeCluster, text: str
) -> None:
    ours, peer = make_cluster().start(LOCAL_COMM_RES=text), make_cluster()
    assert ours.link(peer.start(LISTEN_IP_INFO=LISTEN)) == [c.LLM_PARAM_INVALID]
    assert ours.datadist.links() == peer.datadist.links() == []


@pytest.mark.shows("cpp.constants")
def test_names_that_c_plus_plus_programs_use_beside_the_enums() -> None:
    assert (c.kPrompt, c.kDecoder, c.kMix) == tuple(c.LlmRole)[:3]
    assert c.kPrompt is c.LlmRole.kPrompt
    assert c.KvCacheExtParam().tensor_num_per_layer == c.kDefaultTensorNumPerLayer == 2
