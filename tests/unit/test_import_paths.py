"""The import paths that existing programs use. Spec 2.2."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from llm_datadist.data_type import (
    DataType,
    dtype_to_np_dtype,
    np_dtype_to_dtype,
    valid_np_dtypes,
)


@pytest.mark.shows("names.import_paths")
@pytest.mark.parametrize(
    ("path", "name", "home"),
    [
        ("configs", "LLMConfig", "config"),
        ("configs", "LlmConfig", "config"),
        ("configs", "LLMRole", "types"),
        ("configs", "LLMClusterInfo", "cluster_info"),
        ("status", "LLMStatusCode", "errors"),
        ("status", "LLMException", "errors"),
        ("status", "Status", "errors"),
        ("data_type", "DataType", "types"),
        ("v2.llm_types", "BlocksCacheKey", "keys"),
        ("v2.llm_types", "Cache", "cache"),
        ("v2.llm_types", "CacheDesc", "types"),
        ("v2.llm_types", "CacheKey", "keys"),
        ("v2.llm_types", "CacheKeyByIdAndIndex", "keys"),
        ("v2.llm_types", "LayerSynchronizer", "layerwise"),
        ("v2.llm_types", "MemInfo", "types"),
        ("v2.llm_types", "Memtype", "types"),
        ("v2.llm_types", "Placement", "types"),
        ("v2.llm_types", "RegisterMemStatus", "types"),
        ("v2.llm_types", "CacheTask", "cache_task"),
        ("v2.llm_types", "DataType", "types"),
        ("v2.llm_types", "KvCache", "kv_cache"),
        ("v2.llm_types", "LLMClusterInfo", "cluster_info"),
        ("v2.llm_types", "LLMException", "errors"),
        ("v2.llm_types", "LLMRole", "types"),
        ("v2.llm_types", "LLMStatusCode", "errors"),
        ("v2.llm_types", "Status", "errors"),
        ("v2.llm_types", "TransferConfig", "layerwise"),
        ("v2.llm_types", "TransferWithCacheKeyConfig", "layerwise"),
        ("v2.llm_datadist", "LLMDataDist", "datadist"),
        ("v2.llm_datadist", "_shutdown_handler", "datadist"),
        ("v2.cache_manager", "CacheManager", "cache_manager"),
    ],
)
def test_an_old_path_leads_to_the_same_object(path: str, name: str, home: str) -> None:
    old = importlib.import_module(f"llm_datadist.{path}")
    new = importlib.import_module(f"llm_datadist.{home}")
    assert getattr(old, name) is getattr(new, name)


@pytest.mark.shows("data_type.numpy")
@pytest.mark.parametrize("data_type", dtype_to_np_dtype)
def test_a_numpy_type_has_the_size_of_its_data_type(data_type: DataType) -> None:
    assert np.dtype(dtype_to_np_dtype[data_type]).itemsize == data_type.itemsize


@pytest.mark.shows("data_type.numpy")
def test_only_bf16_and_strings_have_no_numpy_type() -> None:
    assert set(DataType) - set(dtype_to_np_dtype) == {DataType.DT_BF16, DataType.DT_STRING}


@pytest.mark.shows("data_type.numpy")
@pytest.mark.parametrize("data_type", dtype_to_np_dtype)
def test_the_type_of_an_array_leads_back_to_its_data_type(data_type: DataType) -> None:
    array = np.zeros(1, dtype_to_np_dtype[data_type])
    assert np_dtype_to_dtype[array.dtype] is data_type
    assert np_dtype_to_dtype[array.dtype.type] is data_type


@pytest.mark.shows("data_type.numpy")
def test_the_type_of_an_array_is_found_among_the_valid_ones() -> None:
    assert np.zeros(1, np.float16).dtype in valid_np_dtypes
    assert np.zeros(1, np.complex64).dtype not in valid_np_dtypes
