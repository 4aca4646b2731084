"""Import path of existing programs. Spec 2.2."""

from llm_datadist.errors import LLMException, LLMStatusCode, Status

__all__ = ["LLMException", "LLMStatusCode", "Status"]
