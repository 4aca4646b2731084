"""near_names: what is a slip of a known name, and what is another name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_datadist import option_keys
from llm_datadist.config import LLMConfig
from llm_datadist.cpp import CacheDesc, ClusterInfo, IpInfo
from llm_datadist.near_names import nearest

PROPERTIES = sorted(name for name in vars(LLMConfig) if not name.startswith("_"))
KEYS = sorted(
    {
        value
        for value in vars(option_keys).values()
        if isinstance(value, str) and value.startswith(("llm.", "ge.", "llm_datadist."))
    }
    - {"llm_datadist."}
)
known_names = st.sampled_from([*PROPERTIES, *KEYS])


def is_meant(name: str, known: str) -> bool:
    return nearest(name, [known]) == known


@given(known_names, st.data())
def test_one_letter_too_many_too_few_or_twisted_is_a_slip(known: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(1, len(known) - 2).filter(lambda i: known[i : i + 2].isalpha()))
    slips = {
        known[:at] + known[at] + known[at:],
        known[:at] + known[at + 1 :],
        known[:at] + known[at + 1] + known[at] + known[at + 2 :],
    }
    for slip in slips - {known}:
        assert is_meant(slip, known) or len(known[at:].partition(".")[0]) < 3, slip


@given(known_names)
def test_case_underscores_and_plurals_do_not_count(known: str) -> None:
    for slip in (known.upper(), known.replace("_", ""), f"{known}_", f"{known}s"):
        assert is_meant(slip, known)


@pytest.mark.parametrize(
    "name",
    ["dev_mem_pool_cfg", "kv_pool_cfg", "transfer_threads_count", "enable_tracing", "retries",
     "link_timeout", "output_min_size", "rdma_queue_depth", "compression", "tls", "a", ""],
)  # fmt: skip
def test_another_name_is_no_slip(name: str) -> None:
    assert nearest(name, PROPERTIES) is None


@given(st.text(max_size=200))
def test_any_text_is_judged(name: str) -> None:
    assert nearest(name, PROPERTIES) in (None, *PROPERTIES)


def test_the_nearest_of_several_is_named() -> None:
    assert nearest("host_mem_pool_cfgs", PROPERTIES) == "host_mem_pool_cfg"


@pytest.mark.parametrize(
    ("struct", "name", "meant"),
    [
        (ClusterInfo(), "remote_clusterid", "remote_cluster_id"),
        (IpInfo(), "ports", "port"),
        (CacheDesc(), "numTensors", "num_tensors"),
    ],
)
def test_a_struct_of_cpp_has_its_members_alone(struct: object, name: str, meant: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{name}': is '{meant}' meant"):
        setattr(struct, name, 1)
    with pytest.raises(AttributeError, match="of_a_newer_release"):
        setattr(struct, "of_a_newer_release", 1)  # noqa: B010  (mypy would see it)
