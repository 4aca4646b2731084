"""The reference's path to `CacheManager`. Spec 2.2."""

from llm_datadist.cache_manager import CacheManager

__all__ = ["CacheManager"]
