"""Which transports an engine has: ours, those of other packages, and NIXL where it is asked for."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import numpy as np
import pytest
import trustme
from linked_pair import SUCCESS, add_blocks, array_of

from llm_datadist import BlocksCacheKey, LLMConfig, LLMException, LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess, make_array
from llm_datadist.transport.nixl_agent import package

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

INVALID = LLMStatusCode.LLM_PARAM_INVALID
SHAPE = (2, 8, 4096)
KEY = BlocksCacheKey(1, 0)
OURS = """
from llm_datadist.transport.{module} import {name}

class Mine({name}):
    name = "mine"

def broken(movers):
    raise RuntimeError("no such fabric")
"""
needs_nixl = pytest.mark.skipif(
    package() is None, reason="NIXL is not installed: pip install --no-deps nixl-cu12"
)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a package with a transport, for this process and those it starts."""

    def install(target: str, module: str = "tcp", name: str = "TcpTransport") -> None:
        (tmp_path / "my_fabric.py").write_text(OURS.format(module=module, name=name))
        info = tmp_path / "my_fabric-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-fabric\nVersion: 1.0\n")
        points = f"[llm_datadist.transports]\nmine = my_fabric:{target}\n"
        (info / "entry_points.txt").write_text(points)
        monkeypatch.syspath_prepend(tmp_path)

    return install


def path_taken(path: str, **settings: object) -> str:
    """The path of a link between two new processes, over which a pull brings the right bytes."""
    settings = {"enable_remote_cache_accessible": True, **settings}
    if path:
        settings["transfer_path"] = path
    with NodeProcess() as owner, NodeProcess() as reader:
        listen = {"listen_ip_info": "127.0.0.1:0", **settings}
        port = owner.call(Node.start, LLMRole.PROMPT, 1, **listen)
        reader.call(Node.start, LLMRole.DECODER, 2, **listen)
        owner.call(add_blocks, *SHAPE, seed=1, key=KEY)
        assert reader.call(Node.link, port, 1, 10_000) == SUCCESS
        got = reader.call(pull_all)
        np.testing.assert_array_equal(got, make_array(SHAPE, 1))
        taken: str = reader.call(path_of)
    return taken


def path_of(node: Node) -> str:
    (link,) = node.datadist.links()
    return link.path


def pull_all(node: Node) -> object:
    cache, blocks = node.blocks_cache(*SHAPE), list(range(SHAPE[1]))
    node.manager.pull_blocks(KEY, cache, blocks, blocks)
    return array_of(node, cache.cache_id)


def test_a_transport_of_another_package_is_taken_when_it_is_named(
    install: Callable[..., None],
) -> None:
    install("Mine")
    assert path_taken("mine") == "mine"
    assert path_taken("auto") == "cma", "on one host nothing is better"


def test_a_transport_that_cannot_be_made_says_which(
    install: Callable[..., None], node: Node
) -> None:
    install("broken")
    with pytest.raises(LLMException, match=r"transport mine \(my_fabric:broken\).*no such fabric"):
        node.start(LLMRole.DECODER, 2, transfer_path="mine")


def test_a_path_that_nobody_offers_is_refused_with_those_there_are(
    install: Callable[..., None],
) -> None:
    install("Mine")
    config = LLMConfig()
    with pytest.raises(LLMException, match="auto, cma, tcp, nixl, mine, got 'rdma'") as refused:
        config.transfer_path = "rdma"
    assert refused.value.status_code is INVALID


@needs_nixl
def test_nixl_by_its_name_and_as_a_backend() -> None:
    assert path_taken("nixl") == "nixl"
    assert path_taken("", transfer_backend="nixl") == "nixl"
    assert path_taken("", transfer_backend="hixl") == "cma"


@needs_nixl
def test_nixl_under_tls_is_a_warning(
    node: Node, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "LLM_DATADIST")
    authority = trustme.CA()
    mine = authority.issue_cert("kv")
    files = {name: str(tmp_path / name) for name in ("ca", "certificate", "key")}
    authority.cert_pem.write_to_path(files["ca"])
    mine.cert_chain_pems[0].write_to_path(files["certificate"])
    mine.private_key_pem.write_to_path(files["key"])
    node.start(LLMRole.DECODER, 2, transfer_path="nixl", link_security=json.dumps(files))
    assert "what it moves is not encrypted" in caplog.text


@needs_nixl
def test_what_is_not_remote_accessible_stays_out_of_reach() -> None:
    settings: dict[str, object] = {"transfer_path": "nixl", "enable_remote_cache_accessible": True}
    with NodeProcess() as owner, NodeProcess() as reader:
        listen = {"listen_ip_info": "127.0.0.1:0", **settings}
        port = owner.call(Node.start, LLMRole.PROMPT, 1, **listen)
        reader.call(Node.start, LLMRole.DECODER, 2, **settings)
        owner.call(add_blocks, *SHAPE, seed=1, key=KEY, remote_accessible=False)
        assert reader.call(Node.link, port, 1, 10_000) == SUCCESS
        with pytest.raises(LLMException) as refused:
            reader.call(pull_all)
        assert refused.value.status_code is INVALID
