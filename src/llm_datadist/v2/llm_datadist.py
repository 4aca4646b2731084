"""The reference's path to `LLMDataDist`. Spec 2.2; its hook at exit, 5.2."""

from llm_datadist.datadist import LLMDataDist, _shutdown_handler

__all__ = ["LLMDataDist", "_shutdown_handler"]
