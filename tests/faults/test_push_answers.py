"""A push whose receiver answers by what is no answer to it: an error, never success."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from wire import Wire, impostor, owner

from llm_datadist import BlocksCacheKey, LLMException, LLMRole, LLMStatusCode
from llm_datadist.core import messages as m
from llm_datadist.core.registry import KeyName
from llm_datadist.core.remote_keys import pack_keys
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node

SHAPE = (2, 4, 4096)
TIMEOUT_MS = 500
SOON_S = 1.2 * TIMEOUT_MS / 1000 + 0.3
OURS = m.CacheInfo(
    cache_id=1,
    kind=1,
    num_tensors=SHAPE[0],
    num_rows=SHAPE[1],
    row_nbytes=SHAPE[2],
    is_remote_accessible=True,
    is_owned=False,
    generation=5,
    word_addr=0x3000,
    addrs=np.array([0x10000, 0x20000], dtype="<u8").tobytes(),
    keys=pack_keys({KeyName(2**64 - 1, 0): 0}),
)
ANSWERS: list[tuple[str, m.Message]] = [
    ("digested", m.Digested(0)),
    ("attached", m.Attached()),
    ("caches", m.Caches([])),
    ("linked", m.Linked("tcp")),
    ("refused-with-success", m.Refused(0, "fine")),
    ("refused", m.Refused(int(LLMStatusCode.LLM_FAILED), "no")),
]


@pytest.mark.parametrize("answer", [pytest.param(said, id=name) for name, said in ANSWERS])
def test_a_push_that_is_answered_by_another_message_is_an_error(
    node: Node, answer: m.Message
) -> None:
    is_honest = [False]

    def act(wire: Wire, request: m.AnyMessage) -> None:
        if isinstance(request, m.ListCaches):
            wire.send(m.Caches([OURS]))
        else:
            assert isinstance(request, m.Fetch), request
            wire.send(m.Done() if is_honest[0] else answer)

    node.start(
        LLMRole.DECODER,
        2,
        transfer_path="tcp",
        sync_kv_timeout=TIMEOUT_MS,
        enable_remote_cache_accessible=True,
    )
    cache = node.blocks_cache(*SHAPE, seed=1)
    key = BlocksCacheKey(1, 0)
    with impostor(owner(act)) as port:
        assert node.link(port, 1) is LLMStatusCode.LLM_SUCCESS
        with takes_at_most(SOON_S), pytest.raises(LLMException) as error:
            node.manager.push_blocks(key, cache, [3], [2])
        assert error.value.status_code is LLMStatusCode.LLM_FAILED
        is_honest[0] = True
        node.manager.push_blocks(key, cache, [3], [2])
