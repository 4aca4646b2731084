"""Import path of existing programs. Spec 2.2."""

from llm_datadist.cluster_info import LLMClusterInfo
from llm_datadist.config import LLMConfig, LlmConfig
from llm_datadist.types import LLMRole

__all__ = ["LLMClusterInfo", "LLMConfig", "LLMRole", "LlmConfig"]
