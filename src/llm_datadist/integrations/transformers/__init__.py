"""transformers: `generate` over blocks of KV cache that another process can go on from.

    prefill                                            decode
    cache = pool.new_cache()                           cache = pool.fetch(KVHandle.from_json(text))
    model.generate(..., **cache_argument(cache))       model.generate(..., **cache_argument(cache))
    text = pool.publish(cache).to_json()  ---------->

| module | what is in it |
| --- | --- |
| `argument` | cache_argument: how `generate` gets a cache |
| `kept` | what a model keeps of each token |
| `shape` | KVShape: how that lies in blocks |
| `blocks` | the pool's memory, and the table that says which blocks a cache has |
| `cache` | PagedCache: transformers' Cache over a table |
| `handle` | KVHandle: what travels from prefill to decode |
| `pool` | KVPool: new_cache, publish, fetch, release |
"""

# ruff: noqa: E402  (what is missing is said first)

from __future__ import annotations

from importlib.metadata import version as _version
from importlib.util import find_spec as _find_spec

_missing = [name for name in ("torch", "transformers") if _find_spec(name) is None]
if not _missing and int(_version("transformers").partition(".")[0]) < 5:
    _missing = [f"transformers 5 or newer in place of {_version('transformers')}"]
if _missing:
    raise ImportError(
        f"llm_datadist.integrations.transformers needs {' and '.join(_missing)}: "
        "pip install torch 'transformers>=5,<6'"
    )

from llm_datadist.integrations.transformers.argument import cache_argument
from llm_datadist.integrations.transformers.blocks import OutOfBlocks
from llm_datadist.integrations.transformers.cache import PagedCache
from llm_datadist.integrations.transformers.handle import KVHandle
from llm_datadist.integrations.transformers.pool import KVPool
from llm_datadist.integrations.transformers.shape import KVShape

__all__ = ["KVHandle", "KVPool", "KVShape", "OutOfBlocks", "PagedCache", "cache_argument"]
