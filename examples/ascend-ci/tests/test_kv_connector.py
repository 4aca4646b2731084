"""What a mock could not tell: the right bytes in the right blocks, and what a dead prefill does."""

import pytest
from kv_connector import KvConnector

from llm_datadist import LLMException, LLMStatusCode
from llm_datadist.testing.assertions import assert_cache_equal, assert_untouched


@pytest.fixture
def decode(prefill, llm_datadist_port, llm_datadist_clean):
    connector = KvConnector("decode", 2)
    connector.link(1, "127.0.0.1", llm_datadist_port)
    return connector


def test_decode_gets_the_blocks_that_prefill_computed(prefill, decode):
    computed = prefill.call(KvConnector.compute, [3, 7], seed=1)
    before = decode.kv.copy()
    decode.fetch(1, src_blocks=[3, 7], dst_blocks=[0, 5])
    assert_cache_equal(decode.kv, computed, blocks=[0, 5])
    assert_untouched(decode.kv, before, except_blocks=[0, 5])


def test_a_prefill_that_died_is_an_error_and_no_stale_kv(prefill, decode):
    prefill.kill()
    with pytest.raises(LLMException) as failure:
        decode.fetch(1, [3], [0])
    assert failure.value.status_code == LLMStatusCode.LLM_NOT_YET_LINK


def test_a_block_that_prefill_does_not_have_is_refused(decode):
    with pytest.raises(LLMException) as failure:
        decode.fetch(1, [16], [0])
    assert failure.value.status_code == LLMStatusCode.LLM_PARAM_INVALID
