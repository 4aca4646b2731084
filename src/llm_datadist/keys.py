"""The three ways to name a cache of a cluster. Spec 3.9."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias, cast, final, overload

from llm_datadist.checks import check_int64, check_optional, check_type, check_uint32, check_uint64
from llm_datadist.errors import invalid

if TYPE_CHECKING:
    from collections.abc import Mapping

#: stands where an id belongs and there is none: a prefix key has it as `req_id`, other keys have it
#: as `prefix_id`, a placeholder has it as both
NO_ID: Final = 2**64 - 1

_ALIAS: Final = "prompt_cluster_id"


def is_valid_id(value: int) -> bool:
    """Whether a request or prefix id names something. Spec 3.9."""
    return 0 <= value != NO_ID


@final
class CacheKey:
    """Names one batch row of a continuous cache, by request or by prefix. Spec 3.9.

    `CacheKey(cluster_id, req_id, model_id=0, prefix_id=NO_ID)`; the keyword `prompt_cluster_id` is
    another name of `cluster_id`, and positional values go before keywords of the same name.
    A prefix key needs a request id as well: NO_ID. Keys compare by identity.

    Raises LLMException when a parameter is missing, unknown or one too many; TypeError, ValueError
    when one is no uint64.
    """

    @overload
    def __init__(
        self, cluster_id: int, req_id: int, model_id: int = 0, prefix_id: int = NO_ID
    ) -> None: ...
    @overload
    def __init__(
        self, *, prompt_cluster_id: int, req_id: int, model_id: int = 0, prefix_id: int = NO_ID
    ) -> None: ...
    def __init__(self, *args: int, **kwargs: int) -> None:
        given = _bind(
            args,
            kwargs,
            required=("cluster_id", "req_id"),
            defaults={"model_id": 0, "prefix_id": NO_ID},
        )
        self._cluster_id = check_uint64("cluster_id", given["cluster_id"])
        self._req_id = check_uint64("req_id", given["req_id"])
        self._model_id = check_uint64("model_id", given["model_id"])
        self._prefix_id = check_uint64("prefix_id", given["prefix_id"])

    def __repr__(self) -> str:
        return (
            f"CacheKey(cluster_id={self._cluster_id}, req_id={self._req_id}, "
            f"prefix_id={self._prefix_id}, model_id={self._model_id})"
        )

    @property
    def cluster_id(self) -> int:
        """The cluster that owns the cache; of no meaning when a key is bound. Spec 3.9, 6.1."""
        return self._cluster_id

    @property
    def prompt_cluster_id(self) -> int:
        """Another name of `cluster_id`. Spec 3.9."""
        return self._cluster_id

    @property
    def req_id(self) -> int:
        """The request, or NO_ID. Spec 3.9."""
        return self._req_id

    @property
    def model_id(self) -> int:
        """The model, 0 where there is only one. Spec 3.9."""
        return self._model_id

    @property
    def prefix_id(self) -> int:
        """The shared prefix, or NO_ID. Spec 3.9."""
        return self._prefix_id


@final
class BlocksCacheKey:
    """Names a whole blocks cache. Spec 3.9.

    `BlocksCacheKey(cluster_id, model_id=0)`; the keyword `prompt_cluster_id` is another name of
    `cluster_id`. Numbers of any size are accepted, as in the reference; one that is no uint64 just
    names nothing. Keys compare by identity.

    Raises LLMException when a parameter is missing, unknown or one too many; TypeError when one is
    no int. A `model_id` of None is the default; a `cluster_id` of None is accepted, as in the
    reference, and names no cluster.
    """

    @overload
    def __init__(self, cluster_id: int, model_id: int = 0) -> None: ...
    @overload
    def __init__(self, *, prompt_cluster_id: int, model_id: int = 0) -> None: ...
    def __init__(self, *args: int, **kwargs: int) -> None:
        given = _bind(args, kwargs, required=("cluster_id",), defaults={"model_id": 0})
        self._cluster_name = _ALIAS if _ALIAS in kwargs and not args else "cluster_id"
        cluster_id = check_optional(
            f"The first param {self._cluster_name}", given["cluster_id"], int
        )
        self._cluster_id = cast("int", cluster_id)  # None is possible, and names nothing
        self._model_id = check_type("The second param model_id", given["model_id"] or 0, int)

    def __repr__(self) -> str:
        return f"BlocksCacheKey({self._cluster_name}={self._cluster_id}, model_id={self._model_id})"

    @property
    def cluster_id(self) -> int:
        """The cluster that owns the cache; of no meaning when a key is bound. Spec 3.9, 6.1."""
        return self._cluster_id

    @property
    def prompt_cluster_id(self) -> int:
        """Another name of `cluster_id`. Spec 3.9."""
        return self._cluster_id

    @property
    def model_id(self) -> int:
        """The model, 0 where there is only one. Spec 3.9."""
        return self._model_id


@final
class CacheKeyByIdAndIndex:
    """Names a batch row, or a blocks cache, by the id that its owner knows it by. Spec 3.9.

    Raises TypeError, ValueError unless `cluster_id` is a uint64, `cache_id` an int64 and
    `batch_index` a uint32. Keys compare by identity.
    """

    def __init__(self, cluster_id: int, cache_id: int, batch_index: int = 0) -> None:
        self._cluster_id = check_uint64("cluster_id", cluster_id)
        self._cache_id = check_int64("cache_id", cache_id)
        self._batch_index = check_uint32("batch_index", batch_index)

    def __repr__(self) -> str:
        return (
            f"CacheKeyByIdAndIndex(cluster_id={self._cluster_id}, cache_id={self._cache_id}, "
            f"batch_index={self._batch_index})"
        )

    @property
    def cluster_id(self) -> int:
        """The cluster that owns the cache. Spec 3.9."""
        return self._cluster_id

    @property
    def cache_id(self) -> int:
        """The `Cache.cache_id` on that cluster. Spec 3.9."""
        return self._cache_id

    @property
    def batch_index(self) -> int:
        """The batch row; 0 for a blocks cache. Spec 3.9."""
        return self._batch_index


AnyKey: TypeAlias = CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey


def check_one_id(key: AnyKey) -> None:
    """A CacheKey to be pulled names either a request or a prefix. Raises LLMException. Spec 6.9."""
    if isinstance(key, CacheKey) and is_valid_id(key.req_id) == is_valid_id(key.prefix_id):
        raise invalid(f"{key} must have exactly one of req_id and prefix_id")


def _bind(
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    required: tuple[str, ...],
    defaults: Mapping[str, object],
) -> dict[str, object]:
    names = (*required, *defaults)
    if len(args) + len(kwargs) > len(names):
        raise invalid(
            f"Param num is over limit: {len(args) + len(kwargs)} were given, "
            f"the key takes {', '.join(names)}"
        )
    given = {**kwargs, **dict(zip(names, args, strict=False))}
    if _ALIAS in given:
        given.setdefault("cluster_id", given[_ALIAS])
        del given[_ALIAS]
    _check_names(given, required, names)
    return {**defaults, **given}


def _check_names(
    given: Mapping[str, object], required: tuple[str, ...], names: tuple[str, ...]
) -> None:
    for name in required:
        if name not in given:
            raise invalid(f"{name} is required")
    for name in given:
        if name not in names:
            raise invalid(f"Unsupported parameter {name!r}: the key takes {', '.join(names)}")
