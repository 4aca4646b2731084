"""The status of a call, as a number. Spec 3.2, 7.5."""

from __future__ import annotations

from typing import Final, TypeAlias

from llm_datadist.errors import LLMStatusCode

#: what every method returns; LLM_SUCCESS is 0
Status: TypeAlias = int

LLM_SUCCESS: Final[Status] = int(LLMStatusCode.LLM_SUCCESS)
LLM_FAILED: Final[Status] = int(LLMStatusCode.LLM_FAILED)
LLM_WAIT_PROC_TIMEOUT: Final[Status] = int(LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT)
LLM_KV_CACHE_NOT_EXIST: Final[Status] = int(LLMStatusCode.LLM_KV_CACHE_NOT_EXIST)
LLM_PARAM_INVALID: Final[Status] = int(LLMStatusCode.LLM_PARAM_INVALID)
LLM_NOT_YET_LINK: Final[Status] = int(LLMStatusCode.LLM_NOT_YET_LINK)
LLM_ALREADY_LINK: Final[Status] = int(LLMStatusCode.LLM_ALREADY_LINK)
LLM_LINK_FAILED: Final[Status] = int(LLMStatusCode.LLM_LINK_FAILED)
LLM_UNLINK_FAILED: Final[Status] = int(LLMStatusCode.LLM_UNLINK_FAILED)
LLM_NOTIFY_PROMPT_UNLINK_FAILED: Final[Status] = int(LLMStatusCode.LLM_NOTIFY_PROMPT_UNLINK_FAILED)
LLM_CLUSTER_NUM_EXCEED_LIMIT: Final[Status] = int(LLMStatusCode.LLM_CLUSTER_NUM_EXCEED_LIMIT)
LLM_PROCESSING_LINK: Final[Status] = int(LLMStatusCode.LLM_PROCESSING_LINK)
LLM_DEVICE_OUT_OF_MEMORY: Final[Status] = int(LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY)
LLM_EXIST_LINK: Final[Status] = int(LLMStatusCode.LLM_EXIST_LINK)
LLM_FEATURE_NOT_ENABLED: Final[Status] = int(LLMStatusCode.LLM_FEATURE_NOT_ENABLED)
LLM_TIMEOUT: Final[Status] = int(LLMStatusCode.LLM_TIMEOUT)
LLM_LINK_BUSY: Final[Status] = int(LLMStatusCode.LLM_LINK_BUSY)
LLM_OUT_OF_MEMORY: Final[Status] = int(LLMStatusCode.LLM_OUT_OF_MEMORY)
