"""The reference's path to `LLMDataDist`. Spec 2.2."""

from llm_datadist.datadist import LLMDataDist

__all__ = ["LLMDataDist"]
