"""The structs and enums of the C++ interface, by their C++ names. Spec 7.3.

They are plain values to be filled in, with the defaults of the header; the methods of LlmDataDist
check them. Members called `reserved` are left out. As in C++ there are no other members: assigning
to a name that is none is an AttributeError.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from llm_datadist.cpp.data_type import GeDataType
from llm_datadist.named_enum import NamedIntEnum
from llm_datadist.near_names import NamedMembers

if TYPE_CHECKING:
    from llm_datadist.types import DataType


#: key and value
kDefaultTensorNumPerLayer: Final = 2


class LlmRole(NamedIntEnum):
    """What a cluster is for. A label: every role may pull, push and listen. Spec 7.3."""

    kPrompt = 1
    kDecoder = 2
    kMix = 3
    kEnd = 4  #: no role: it ends the list


# C++ knows the roles by these names, too
kPrompt: Final = LlmRole.kPrompt
kDecoder: Final = LlmRole.kDecoder
kMix: Final = LlmRole.kMix


class CachePlacement(NamedIntEnum):
    """Which memory a cache lies in. Spec 7.3."""

    kHost = 0
    kDevice = 1


@dataclass(slots=True)
class IpInfo(NamedMembers):
    """An address. Spec 7.3."""

    ip: str = ""  #: an IPv4 or IPv6 literal
    port: int = 0


@dataclass(slots=True)
class ClusterInfo(NamedMembers):
    """A cluster to link to or to unlink. Spec 7.3."""

    #: found out in the hand-shake: linking with 0 to a cluster of another id works
    remote_cluster_id: int = 0
    remote_role_type: int = 0  #: nothing reads it
    #: checked, but not needed; of several devices, none or one for each
    local_ip_infos: list[IpInfo] = field(default_factory=list)
    #: where the peer listens: one for each of its devices, in their order
    remote_ip_infos: list[IpInfo] = field(default_factory=list)


@dataclass(slots=True)
class CacheIndex(NamedMembers):
    """Names a cache of a cluster, or a batch row of it. Spec 7.3."""

    cluster_id: int = 0
    cache_id: int = 0
    batch_index: int = 0


@dataclass(slots=True)
class CacheDesc(NamedMembers):
    """What a cache looks like: `num_tensors` tensors of one shape and type. Spec 7.3.

    Dim 0 of the shape counts the batch rows, which are the blocks as well.
    """

    placement: CachePlacement = CachePlacement.kDevice
    num_tensors: int = 0
    data_type: DataType | GeDataType = GeDataType.DT_UNDEFINED
    shape: list[int] | tuple[int, ...] = field(default_factory=list)


@dataclass(slots=True)
class Cache(NamedMembers):
    """A cache of this cluster. Spec 7.3.

    `AllocateCache` returns one that is filled in. For a registered cache the program makes its own,
    of the id that it got; the description is looked at where it is pushed from. On several devices
    it has `num_tensors` on each, and one id; the addresses of the first device come first.
    """

    cache_id: int = -1
    tensor_addrs: list[int] = field(default_factory=list)
    cache_desc: CacheDesc = field(default_factory=CacheDesc)


@dataclass(slots=True)
class KvCacheExtParam(NamedMembers):
    """Which layers a transfer moves. Spec 7.3, 7.4.

    Ranges are inclusive: (0, 1) is two layers, and (-1, -1) means all. A layer is
    `tensor_num_per_layer` tensors.
    """

    src_layer_range: tuple[int, int] = (-1, -1)
    dst_layer_range: tuple[int, int] = (-1, -1)
    tensor_num_per_layer: int = kDefaultTensorNumPerLayer


@dataclass(slots=True)
class RegisterCfg(NamedMembers):
    """Settings of RegisterKvCache; there are none. Spec 7.3."""
