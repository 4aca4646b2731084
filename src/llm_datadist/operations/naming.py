"""Keys: which are allowed where, and what they are looked up by."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from llm_datadist.core.registry import KeyName
from llm_datadist.core.remote import RemoteRow
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.keys import NO_ID, BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex, is_valid_id

if TYPE_CHECKING:
    from llm_datadist.core.remote import RemoteCache

AnyKey: TypeAlias = CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey


def name_of(key: CacheKey | BlocksCacheKey) -> KeyName | None:
    """What a key is filed under; None for a placeholder. Spec 6.2."""
    if isinstance(key, BlocksCacheKey):
        return KeyName(NO_ID, key.model_id)
    if is_valid_id(key.prefix_id):
        return KeyName(key.prefix_id, key.model_id, is_prefix=True)
    return KeyName(key.req_id, key.model_id) if is_valid_id(key.req_id) else None


def remote_row(key: AnyKey, tensors: range | None = None) -> RemoteRow:
    """What a key leads to at its cluster. Raises LLMException for one that names nothing."""
    if isinstance(key, CacheKeyByIdAndIndex):
        return RemoteRow(key.cluster_id, key.cache_id, key.batch_index, tensors)
    name = name_of(key)
    if name is None:
        raise invalid(f"{key} has neither a req_id nor a prefix_id")
    if not 0 <= name.model_id < 2**64:
        raise LLMException(f"no cache can have {key}", LLMStatusCode.LLM_KV_CACHE_NOT_EXIST)
    return RemoteRow(key.cluster_id, name, None, tensors)


def check_one_id(key: AnyKey) -> None:
    """A CacheKey to be pulled names either a request or a prefix. Spec 6.9."""
    if isinstance(key, CacheKey) and is_valid_id(key.req_id) == is_valid_id(key.prefix_id):
        raise invalid(f"{key} must have exactly one of req_id and prefix_id")


def check_row(remote: RemoteCache, row: int) -> None:
    """A batch row that is not there is LLM_KV_CACHE_NOT_EXIST, as a cache is. Spec 6.9, O9."""
    geometry = remote.layout.geometry
    if geometry.has_batch_rows and row >= geometry.num_rows:
        raise LLMException(
            f"the peer's cache {remote.guard.cache_id} has no row {row}, but {geometry.num_rows}",
            LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
        )


class Named:
    """Failures under `with` say which call they belong to; `template` has {key} and {cache_id}."""

    __slots__ = ("_cache_id", "_key", "_template")

    def __init__(self, template: str, key: object, cache_id: int) -> None:
        self._template = template
        self._key = key
        self._cache_id = cache_id

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, LLMException):
            what = self._template.format(key=self._key, cache_id=self._cache_id)
            raise LLMException(f"{what}: {error}", error.status_code) from error
