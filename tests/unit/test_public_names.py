"""What `llm_datadist` exports. Spec 2.1, decision O1."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import llm_datadist

if TYPE_CHECKING:
    from collections.abc import Mapping

V2_NAMES = [
    "LLMClusterInfo",
    "LLMStatusCode",
    "LLMException",
    "LLMRole",
    "LlmConfig",
    "LLMConfig",
    "DataType",
    "Status",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "KvCache",
    "Cache",
    "BlocksCacheKey",
    "LLMDataDist",
    "Placement",
    "RegisterMemStatus",
    "LayerSynchronizer",
    "TransferConfig",
    "CacheTask",
    "TransferWithCacheKeyConfig",
    "Memtype",
    "MemInfo",
]
V1_NAMES = ["TensorDesc", "Tensor", "KvCacheManager"]


@pytest.mark.shows("names.all")
def test_the_documented_names_are_exported() -> None:
    assert llm_datadist.__all__ == [*V2_NAMES, *V1_NAMES]


@pytest.mark.shows("names.all")
@pytest.mark.parametrize("name", [*V2_NAMES, *V1_NAMES])
def test_a_documented_name_is_a_class(name: str) -> None:
    assert isinstance(getattr(llm_datadist, name), type)


@pytest.mark.shows("names.all")
def test_a_star_import_brings_the_documented_names_and_no_others() -> None:
    names: dict[str, object] = {}
    exec("from llm_datadist import *", names)
    del names["__builtins__"]
    assert names == {name: getattr(llm_datadist, name) for name in [*V2_NAMES, *V1_NAMES]}


@pytest.mark.shows("names.v2_list")
def test_v2_list_leaves_the_v1_mode_out() -> None:
    assert llm_datadist.v2_list == V2_NAMES


@pytest.mark.shows("names.aliases")
@pytest.mark.parametrize("name", ["LLMDatadist", "PushType", "v3_list"])
def test_an_unknown_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match="has no attribute"):
        getattr(llm_datadist, name)


@pytest.mark.shows("names.import_paths")
def test_the_cache_manager_is_not_at_the_top() -> None:
    assert not hasattr(llm_datadist, "CacheManager")


def memory_variable_after_import(environment: Mapping[str, str]) -> str:
    inherited = {k: v for k, v in os.environ.items() if k != "AUTO_USE_UC_MEMORY"}
    program = "import llm_datadist, os; print(os.environ['AUTO_USE_UC_MEMORY'])"
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


@pytest.mark.shows("names.environment")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "0\n"),
        ({"AUTO_USE_UC_MEMORY": "1"}, "1\n"),
        ({"AUTO_USE_UC_MEMORY": ""}, "\n"),
    ],
)
def test_importing_sets_the_memory_variable_unless_it_is_set(
    before: dict[str, str], after: str
) -> None:
    assert memory_variable_after_import(before) == after
