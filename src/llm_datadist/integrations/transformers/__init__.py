"""transformers: `generate` over blocks of KV cache that another process can go on from.

    prefill                                            decode
    cache = pool.new_cache()                           cache = pool.fetch(KVHandle.from_json(text))
    model.generate(..., past_key_values=cache)         model.generate(..., past_key_values=cache)
    text = pool.publish(cache).to_json()  ---------->

| module | what is in it |
| --- | --- |
| `shape` | KVShape: how a model's KV cache lies in blocks |
| `blocks` | the pool's memory, and the table that says which blocks a cache has |
| `cache` | PagedCache: transformers' Cache over a table |
| `handle` | KVHandle: what travels from prefill to decode |
| `pool` | KVPool: new_cache, publish, fetch, release |
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
    import transformers as _transformers
except ModuleNotFoundError as _error:
    raise ImportError(
        f"llm_datadist.integrations.transformers needs {_error.name}: "
        "pip install 'llm-datadist[transformers]'",
        name=_error.name,
    ) from _error
if int(_transformers.__version__.split(".")[0]) < 5:
    raise ImportError(
        "llm_datadist.integrations.transformers needs transformers 5 or newer, "
        f"{_transformers.__version__} is installed: pip install 'llm-datadist[transformers]'",
        name="transformers",
    )

from llm_datadist.integrations.transformers.blocks import OutOfBlocks
from llm_datadist.integrations.transformers.cache import PagedCache
from llm_datadist.integrations.transformers.handle import KVHandle
from llm_datadist.integrations.transformers.pool import KVPool
from llm_datadist.integrations.transformers.shape import KVShape

__all__ = ["KVHandle", "KVPool", "KVShape", "OutOfBlocks", "PagedCache"]
