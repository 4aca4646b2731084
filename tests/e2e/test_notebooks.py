"""Notebooks and scripts: cells that are run again, and what is dropped without an end."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    DataType,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node


def run_cell() -> LLMDataDist:
    config = LLMConfig()
    config.enable_cache_manager = True
    config.listen_ip_info = "127.0.0.1:0"
    datadist = LLMDataDist(LLMRole.MIX, 1)
    datadist.init(config.generate_options())
    return datadist


def test_leaving_a_with_block_finalizes() -> None:
    with run_cell() as datadist:
        assert datadist.links() == []
    assert LLMDataDist.llm_engine_instance is None
    with pytest.raises(KeyError, match="mine"), run_cell():
        raise KeyError("mine")
    assert LLMDataDist.llm_engine_instance is None


def test_a_cell_that_is_run_again_ends_what_nobody_can_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run_cell()
    gc.collect()
    with caplog.at_level(logging.WARNING, "LLM_DATADIST"):
        datadist = run_cell()
    assert "cluster 1 was dropped without finalize" in caplog.text
    assert LLMDataDist.llm_engine_instance is datadist
    datadist.finalize()


@pytest.mark.parametrize("kept", ["itself", "its manager", "a cache"])
def test_what_a_program_still_has_is_not_ended_and_the_refusal_says_how_to(kept: str) -> None:
    datadist = run_cell()
    held: object = datadist
    if kept != "itself":
        manager = datadist.cache_manager
        held = manager
        if kept == "a cache":
            memory = np.zeros(64, np.uint8)
            held = manager.register_blocks_cache(CacheDesc(1, [1, 64], DataType.DT_UINT8), [memory])
        del manager
    del datadist
    gc.collect()
    with pytest.raises(LLMException) as refused:
        run_cell()
    assert held is not None
    assert refused.value.status_code is LLMStatusCode.LLM_FAILED
    assert "LLMDataDist.llm_engine_instance.finalize()" in str(refused.value)
    assert LLMDataDist.llm_engine_instance is not None
    LLMDataDist.llm_engine_instance.finalize()
    run_cell().finalize()


def test_a_key_that_is_registered_again_is_said_with_where_it_leads(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    node.start(LLMRole.MIX, 1)
    with caplog.at_level(logging.WARNING, "LLM_DATADIST"):
        for _ in range(2):
            node.add_blocks(key=BlocksCacheKey(1, 7))
        assert "named cache 1 already; of that and the new cache 2 it leads to 2" in caplog.text
        for _ in range(2):
            node.add_rows(keys=[CacheKey(1, 5)])
        assert "named cache 3 already; of that and the new cache 4 it leads to 3" in caplog.text
