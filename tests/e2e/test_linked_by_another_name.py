"""Linking again by another name of one address (spec 5.4, "Again")."""

from __future__ import annotations

from typing import TYPE_CHECKING

import linking
import pytest
from linking import ALREADY_LINK, SUCCESS, link_list, listen, pulls

from llm_datadist import LLMRole

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node, NodeProcess


@pytest.mark.parametrize("cluster_id", [1, None])
def test_another_name_of_the_same_address_is_already_link(
    node: Node, peer: NodeProcess, cluster_id: int | None
) -> None:
    port = listen(peer)
    node.start(LLMRole.DECODER, 2)
    assert node.link(port, cluster_id) == SUCCESS
    before = link_list(node)
    assert pulls(node, 1)
    assert node.link(port, cluster_id, host="localhost") == ALREADY_LINK
    assert link_list(node) == before


other = linking.other
