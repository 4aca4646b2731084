"""Two machines as two hosts: a kernel each, and a network card at each end of the wire."""

from __future__ import annotations

import json
import logging
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from bed.inside.far import HOSTS, NETDEV, FarProcess, die, join_network
from bed.inside.soft_roce import COUNTERS, UCX, add_device, remedy
from certificates import Authority
from llm_datadist.testing.cluster import Node, NodeProcess, make_array
from llm_datadist.testing.contract_steps import (
    HUGE,
    LOST,
    OWNER,
    READER,
    SHAPE,
    SUCCESS,
    own,
    pull_status,
    pull_until_lost,
    push_blocks,
)
from llm_datadist.types import LLMRole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.errors import LLMStatusCode

LINK_TIMEOUT_MS = 50_000
TIMEOUT_MS = 5_000
#: what an emulated machine needs to schedule, beyond the fifth that is promised
SLACK_S = 0.5
FOLDER = Path("/run/certificates")
BY_SECRET = json.dumps({"secret": "a secret of more than sixteen bytes"})
BY_ANOTHER = json.dumps({"secret": "another secret of many bytes"})
REASON = "cma: the peer is on another host"


# -- run by the nodes ------------------------------------------------------------------------------


def set_mtu(node: Node, mtu: int) -> None:
    subprocess.run(["ip", "link", "set", NETDEV, "mtu", str(mtu)], check=True)


def write(node: Node, files: dict[Path, bytes]) -> None:
    for path, content in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def links(node: Node) -> list[tuple[str, str]]:
    return [(link.path, link.path_reason) for link in node.datadist.links()]


class Recorder(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _logged.append(record.getMessage())


_logged: list[str] = []


def record_log(node: Node) -> None:
    logger = logging.getLogger("LLM_DATADIST")
    logger.addHandler(Recorder())
    logger.setLevel(logging.WARNING)


def logged(node: Node) -> list[str]:
    return _logged


def add_rdma(node: Node) -> str:
    """What its processes need in LD_LIBRARY_PATH."""
    add_device(NETDEV)
    return remedy()


def has_come(node: Node, cache_id: int, seed: int, src: list[int], dst: list[int]) -> bool:
    return bool((node.arrays[cache_id][:, dst] == make_array(SHAPE, seed)[:, src]).all())


# -- tests -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def near() -> Iterator[NodeProcess]:
    join_network(HOSTS[0])
    with NodeProcess() as process:
        yield process


@pytest.fixture(scope="module")
def far(near: NodeProcess) -> Iterator[FarProcess]:
    with FarProcess() as process:
        yield process


@pytest.fixture(scope="module")
def by_tls(far: FarProcess) -> str:
    """The `link_security` of both, which have a certificate of one authority."""
    files = Authority().issue(FOLDER)
    far.call(write, {path: path.read_bytes() for path in files})
    return files.option()


@pytest.fixture
def pair(near: NodeProcess, far: FarProcess) -> Iterator[tuple[NodeProcess, FarProcess]]:
    yield near, far
    for process in (near, far):
        process.call(Node.stop)


def linked(
    pair: tuple[NodeProcess, FarProcess],
    security: str = "",
    *,
    is_accessible: bool = True,
    **settings: object,
) -> None:
    """The far one calls the near one."""
    near, far = pair
    for process, cluster_id in ((near, OWNER), (far, READER)):
        port = process.call(
            Node.start, LLMRole.MIX, cluster_id, sync_kv_timeout=TIMEOUT_MS,
            listen_ip_info=f"{HOSTS[cluster_id - 1]}:0", link_security=security,
            enable_remote_cache_accessible=is_accessible, **settings,
        )  # fmt: skip
        if process is near:
            nears = port
    assert far.call(Node.link, nears, OWNER, LINK_TIMEOUT_MS, host=HOSTS[0]) is SUCCESS


@pytest.mark.parametrize("security", ["open", "secret", "tls"])
@pytest.mark.parametrize("mtu", [1280, 1500, 9000])
def test_bytes_go_both_ways_by_tcp(
    pair: tuple[NodeProcess, FarProcess], mtu: int, security: str, by_tls: str, is_accessible: bool
) -> None:
    near, far = pair
    for process in pair:
        process.call(set_mtu, mtu)
    option = {"open": "", "secret": BY_SECRET, "tls": by_tls}[security]
    linked(pair, option, is_accessible=is_accessible)
    assert far.call(links) == [("tcp", REASON)], "whoever calls knows why"
    assert [path for path, _ in near.call(links)] == ["tcp"]
    for process in pair:
        process.call(own, SHAPE)
    assert near.call(pull_status, READER, SHAPE) is SUCCESS
    assert far.call(pull_status, OWNER, SHAPE) is SUCCESS
    if not is_accessible:
        return
    src, dst = [2, 5], [5, 11]
    for process, other, others_id in ((near, far, READER), (far, near, OWNER)):
        landing = other.call(own, SHAPE, seed=None, model_id=7)
        process.call(push_blocks, others_id, src, dst)
        assert other.call(has_come, landing, OWNER + READER - others_id, src, dst)


def test_a_wrong_secret_is_refused_in_a_sentence(pair: tuple[NodeProcess, FarProcess]) -> None:
    near, far = pair
    port = near.call(
        Node.start, LLMRole.MIX, OWNER, listen_ip_info=f"{HOSTS[0]}:0", link_security=BY_SECRET
    )
    near.call(record_log)
    far.call(Node.start, LLMRole.MIX, READER, link_security=BY_ANOTHER)
    assert far.call(Node.link, port, OWNER, LINK_TIMEOUT_MS, host=HOSTS[0]) is not SUCCESS
    assert near.call(links) == []
    refused = f"refused a connection from {HOSTS[1]}: link security: "
    assert [line for line in near.call(logged) if line.startswith(refused)], near.call(logged)


@pytest.fixture(scope="module")
def with_rdma(near: NodeProcess, far: FarProcess) -> Iterator[tuple[NodeProcess, FarProcess]]:
    """Processes for which UCX has nothing but RDMA, over the network that joins the machines."""
    for process in (near, far):
        process.call(set_mtu, 1500)
        libraries = process.call(add_rdma)
    environment = {**UCX, "LD_LIBRARY_PATH": libraries}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with NodeProcess() as one, FarProcess(**environment) as other:
            yield one, other


def test_bytes_go_both_ways_by_rdma(
    with_rdma: tuple[NodeProcess, FarProcess], is_accessible: bool
) -> None:
    sent = COUNTERS / "sent_pkts"
    before = int(sent.read_text())
    linked(with_rdma, is_accessible=is_accessible, transfer_path="nixl")
    near, far = with_rdma
    for process in with_rdma:
        assert [path for path, _ in process.call(links)] == ["nixl"]
        process.call(own, SHAPE)
    assert near.call(pull_status, READER, SHAPE) is SUCCESS
    assert far.call(pull_status, OWNER, SHAPE) is SUCCESS
    assert int(sent.read_text()) > before
    for process in with_rdma:
        process.call(Node.stop)


def test_a_machine_that_is_gone_is_an_error_in_time(near: NodeProcess, far: FarProcess) -> None:
    """The last one: the machine does not come back."""
    linked((near, far))
    far.call(own, HUGE)
    assert near.call(pull_status, READER, HUGE) is SUCCESS
    near.begin(pull_until_lost, READER, HUGE)
    far.begin(die)
    status, worst_s = cast("tuple[LLMStatusCode, float]", near.result())
    assert status in LOST
    assert worst_s <= 1.2 * TIMEOUT_MS / 1000 + SLACK_S
