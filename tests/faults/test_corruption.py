"""A network that flips bits, between two processes: with TLS, and without."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import proxied
import pytest
import trustme
from proxied import (
    BUDGET_S,
    FAILED,
    MOVED_NBYTES,
    NOT_YET_LINK,
    SHAPE,
    SUCCESS,
    TIMEOUT,
    Ends,
    start,
    start_owner,
)

from llm_datadist.testing.faults import FaultProxy
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from llm_datadist.testing.cluster import Node, NodeProcess

bystander_process, bystander = proxied.bystander_process, proxied.bystander
settings = proxied.settings
ends = proxied.ends
DIRECTIONS = pytest.mark.parametrize("to_caller", [True, False])


@pytest.fixture
def sealed(
    node: Node, peer: NodeProcess, bystander: NodeProcess, settings: dict[str, Any], tmp_path: Path
) -> Iterator[Ends]:
    """Under TLS."""
    ca = trustme.CA()
    certificate = ca.issue_cert("cluster.example")
    files = {name: tmp_path / f"{name}.pem" for name in ("ca", "certificate", "key")}
    ca.cert_pem.write_to_path(str(files["ca"]))
    certificate.private_key_pem.write_to_path(str(files["key"]))
    files["certificate"].write_bytes(certificate.cert_chain_pems[0].bytes())
    security = json.dumps({name: str(path) for name, path in files.items()})
    settings["link_security"] = security
    settings["sync_kv_timeout"] = 2000
    with FaultProxy(start_owner(peer, **settings)) as proxy:
        yield start(node, peer, bystander, proxy, **settings)


# not the first one: where the kernel seals, nobody looks at it
@pytest.mark.parametrize("at", [1, 9, 100, MOVED_NBYTES // 2 + 7, -17, -1])
def test_a_flipped_bit_is_an_error_under_tls(sealed: Ends, at: int) -> None:
    before = sealed.proxy.nbytes_passed()
    assert sealed.pull() == SUCCESS
    needed = sealed.proxy.nbytes_passed() - before
    sealed.proxy.corrupt(after_nbytes=at % needed)
    with takes_at_most(2.5):
        status = sealed.pull()
    assert sealed.proxy.wait(0)
    assert status in (NOT_YET_LINK, FAILED, TIMEOUT)
    assert sealed.pull(3) == SUCCESS
    assert sealed.pull() == SUCCESS, "the link was not harmed"
    assert sealed.unlink() == SUCCESS
    assert sealed.works_again()


@pytest.mark.parametrize("at", [0, 5, 40, 200, 700, 1500])
@DIRECTIONS
def test_a_flipped_bit_in_the_hand_shake_under_tls_makes_no_link(
    sealed: Ends, at: int, to_caller: bool
) -> None:
    assert sealed.unlink() == SUCCESS
    sealed.proxy.corrupt(at, to_caller=to_caller)
    with takes_at_most(BUDGET_S):
        assert sealed.link() != SUCCESS
    assert sealed.proxy.wait(0)
    assert sealed.is_unlinked_at_both_ends()
    assert sealed.works_again()


def test_a_flipped_bit_around_the_data_is_never_a_false_success(ends: Ends) -> None:
    """Without TLS: in the frame before the bytes, and in the trailer behind them."""
    dst = [3]
    assert ends.pull(dst=dst) == SUCCESS
    before = ends.proxy.nbytes_passed()
    assert ends.pull(dst=dst) == SUCCESS
    needed = ends.proxy.nbytes_passed() - before
    frame = needed - SHAPE[0] * SHAPE[2] - 16
    assert 8 < frame < 64
    for at in (*range(frame), *range(needed - 16, needed)):
        ends.proxy.corrupt(at)
        with takes_at_most(BUDGET_S):
            ends.pull(dst=dst)
        assert ends.proxy.wait(0), at
        assert ends.pull(dst=dst) == SUCCESS, "on another stream"
    assert ends.pull(3) == SUCCESS
