"""How the installed transformers takes a cache."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING

from transformers.generation import GenerationMixin

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

#: transformers 5.24 gave the argument a new name, and warns of the old one. That it takes the new
#: one has to be seen where it is named: `generate` and `forward` swallow any keyword.
_ARGUMENT = next(
    name
    for name in ("cache", "past_key_values")
    if name in signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


def cache_argument(cache: Cache) -> dict[str, Cache]:
    """`cache` as the keyword argument that the installed transformers has for it.

    For `model.generate(..., **cache_argument(cache))` and `model(..., **cache_argument(cache))`:
    that is `cache=cache` from transformers 5.24 on, and `past_key_values=cache` before. Any Cache
    of transformers will do.
    """
    return {_ARGUMENT: cache}
