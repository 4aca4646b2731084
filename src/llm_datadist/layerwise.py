"""Layer-wise transfer: who says that a layer is ready, and where its bytes go. Spec 3.10, 6.12."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeAlias, final

from llm_datadist.checks import check_type, check_uint32, check_uint64, check_uint64_sequence
from llm_datadist.errors import invalid
from llm_datadist.keys import BlocksCacheKey, CacheKeyByIdAndIndex
from llm_datadist.near_names import NamedAttributes

LayerKey: TypeAlias = BlocksCacheKey | CacheKeyByIdAndIndex


class LayerSynchronizer(ABC):
    """Tells a transfer when a layer of the source cache is computed. For users to subclass."""

    @abstractmethod
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        """Wait for layer `layer_index`; False, or an exception, ends the whole transfer.

        Called in the transfer's thread, in ascending order, once for each layer that some config
        asks for. `timeout_in_millis` is always None. Spec 3.10, 6.12.
        """


def check_layer_range(name: str, value: object) -> range:
    """`value`, a range of layers: step 1, not empty, not negative. Spec 3.10.

    Raises TypeError when it is no range, LLMException when it is another one.
    """
    layers = check_type(name, value, range)
    if layers.step != 1 or not 0 <= layers.start < layers.stop:
        raise invalid(f"{name} must be range(start, stop) with 0 <= start < stop, got {layers}")
    return layers


def check_optional_layer_range(name: str, value: object) -> range | None:
    """As `check_layer_range`; None passes and means all layers. Spec 3.10."""
    return None if value is None else check_layer_range(name, value)


@final
class TransferConfig(NamedAttributes):
    """One destination of a layer-wise transfer, by address. Spec 3.10, 6.12.

    `dst_addrs` are addresses in the destination process, two for each layer of `src_layer_range`
    (key, then value). Constructor and setters raise TypeError for a wrong type, ValueError for a
    number out of range, LLMException for a range of layers that cannot be.
    """

    #: of no meaning here; the other config has one
    dst_layer_range: range | None = None

    def __init__(
        self,
        dst_cluster_id: int,
        dst_addrs: list[int] | tuple[int, ...],
        src_layer_range: range | None = None,
        src_batch_index: int = 0,
    ) -> None:
        self.dst_cluster_id = dst_cluster_id
        self.dst_addrs = dst_addrs
        self.src_layer_range = src_layer_range
        self.src_batch_index = src_batch_index

    def __repr__(self) -> str:
        return (
            f"TransferConfig(dst_cluster_id={self._dst_cluster_id}, dst_addrs={self._dst_addrs}, "
            f"src_layer_range={self._src_layer_range}, src_batch_index={self._src_batch_index})"
        )

    @property
    def dst_cluster_id(self) -> int:
        """The cluster that receives, a uint64. Spec 3.10."""
        return self._dst_cluster_id

    @dst_cluster_id.setter
    def dst_cluster_id(self, value: int) -> None:
        self._dst_cluster_id = check_uint64("dst_cluster_id", value)

    @property
    def dst_addrs(self) -> list[int] | tuple[int, ...]:
        """Addresses in the destination process, uint64 each. Spec 3.10."""
        return self._dst_addrs

    @dst_addrs.setter
    def dst_addrs(self, value: list[int] | tuple[int, ...]) -> None:
        self._dst_addrs = check_uint64_sequence("dst_addrs", value)

    @property
    def src_layer_range(self) -> range | None:
        """The layers to send; None for all, until a transfer fills it in. Spec 3.10, 6.12."""
        return self._src_layer_range

    @src_layer_range.setter
    def src_layer_range(self, value: range | None) -> None:
        self._src_layer_range = check_optional_layer_range("src_layer_range", value)

    @property
    def src_batch_index(self) -> int:
        """The batch row of the source, a uint32; 0 for a blocks cache. Spec 3.10."""
        return self._src_batch_index

    @src_batch_index.setter
    def src_batch_index(self, value: int) -> None:
        self._src_batch_index = check_uint32("src_batch_index", value)


@final
class TransferWithCacheKeyConfig(NamedAttributes):
    """One destination of a layer-wise transfer, by key (remote-accessible mode). Spec 3.10.

    Layer i of `src_layer_range` goes to layer i of `dst_layer_range`, counted from their starts
    (decision O6). Both must be given, despite their defaults.

    Raises TypeError for a wrong type, ValueError for a number out of range, LLMException for ranges
    of different lengths and for a batch row of a blocks cache. Setters check their own value only,
    and accept None where the constructor does not: the transfer has the last word.
    """

    def __init__(
        self,
        cache_key: LayerKey,
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        src_batch_index: int = 0,
    ) -> None:
        self._cache_key: LayerKey | None = _check_key(cache_key)
        self._src_layer_range: range | None = check_layer_range("src_layer_range", src_layer_range)
        self._dst_layer_range: range | None = check_layer_range("dst_layer_range", dst_layer_range)
        if len(self._src_layer_range) != len(self._dst_layer_range):
            raise invalid(
                f"src_layer_range and dst_layer_range must be equally long, "
                f"got {src_layer_range} and {dst_layer_range}"
            )
        self.src_batch_index = src_batch_index
        if isinstance(cache_key, BlocksCacheKey) and src_batch_index != 0:
            raise invalid(
                f"src_batch_index {src_batch_index} != 0 while src is blocks, as cache_key is"
            )

    def __repr__(self) -> str:
        return (
            f"TransferWithCacheKeyConfig(cache_key={self._cache_key}, "
            f"src_layer_range={self._src_layer_range}, dst_layer_range={self._dst_layer_range}, "
            f"src_batch_index={self._src_batch_index})"
        )

    @property
    def dst_cluster_id(self) -> int | None:
        """The cluster that receives: the one of the key. Spec 3.10, decision O31."""
        return None if self._cache_key is None else self._cache_key.cluster_id

    @property
    def cache_key(self) -> LayerKey | None:
        """Names the destination cache. Spec 3.10."""
        return self._cache_key

    @cache_key.setter
    def cache_key(self, value: LayerKey | None) -> None:
        self._cache_key = None if value is None else _check_key(value)

    @property
    def src_layer_range(self) -> range | None:
        """The layers to send. Spec 3.10."""
        return self._src_layer_range

    @src_layer_range.setter
    def src_layer_range(self, value: range | None) -> None:
        self._src_layer_range = check_optional_layer_range("src_layer_range", value)

    @property
    def dst_layer_range(self) -> range | None:
        """The layers to overwrite. Spec 3.10."""
        return self._dst_layer_range

    @dst_layer_range.setter
    def dst_layer_range(self, value: range | None) -> None:
        self._dst_layer_range = check_optional_layer_range("dst_layer_range", value)

    @property
    def src_batch_index(self) -> int:
        """The batch row of the source, a uint32; 0 for a blocks cache. Spec 3.10."""
        return self._src_batch_index

    @src_batch_index.setter
    def src_batch_index(self, value: int) -> None:
        self._src_batch_index = check_uint32("src_batch_index", value)


def _check_key(value: object) -> LayerKey:
    return check_type("cache_key", value, BlocksCacheKey, CacheKeyByIdAndIndex)
