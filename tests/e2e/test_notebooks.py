"""Notebooks and scripts: cells that are run again, and what is dropped without an end."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheKey,
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


def test_a_cell_that_is_run_again_says_how_to_end_what_nobody_can_name() -> None:
    run_cell()
    gc.collect()
    with pytest.raises(LLMException) as refused:
        run_cell()
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
