import pytest
from kv_connector import KvConnector


@pytest.fixture
def prefill(llm_datadist_spawn, llm_datadist_port):
    return llm_datadist_spawn(KvConnector, "prefill", 1, f"127.0.0.1:{llm_datadist_port}")
