"""Arguments of the C++ interface: checked, and as a cluster takes them. Spec 7.4.

Wrong types raise TypeError; all else that cannot be, ValueError or LLMException, whose status is
LLM_PARAM_INVALID.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.checks import (
    check_int32,
    check_int64,
    check_sequence,
    check_type,
    check_uint16,
    check_uint32,
    check_uint64,
    check_uint64_sequence,
)
from llm_datadist.core.geometry import CacheKind, Geometry
from llm_datadist.cpp.data_type import nbytes_of
from llm_datadist.cpp.types import (
    Cache,
    CacheDesc,
    CacheIndex,
    CachePlacement,
    ClusterInfo,
    IpInfo,
)
from llm_datadist.endpoint import Endpoint, is_ip_literal
from llm_datadist.errors import invalid
from llm_datadist.keys import CacheKeyByIdAndIndex
from llm_datadist.links.linker import Target
from llm_datadist.types import Placement

if TYPE_CHECKING:
    from collections.abc import Sequence


def parse_targets(clusters: object) -> list[Target]:
    """Whom to link to or to unlink; nobody when one of the addresses is none. Spec 7.4."""
    infos = check_sequence("clusters", clusters, ClusterInfo)
    if not infos:
        raise invalid("clusters is empty")
    local = [_endpoints("local_ip_infos", info.local_ip_infos) for info in infos]
    return [
        Target(
            check_uint64("remote_cluster_id", info.remote_cluster_id),
            _endpoints("remote_ip_infos", info.remote_ip_infos),
            len(ours),
        )
        for info, ours in zip(infos, local, strict=True)
    ]


def parse_timeout_s(timeout_in_millis: object) -> float:
    """Milliseconds, as seconds. Spec 7.4."""
    millis = check_int32("timeout_in_millis", timeout_in_millis)
    if millis <= 0:
        raise invalid(f"timeout_in_millis must be greater than 0, got {millis}")
    return millis / 1000


def parse_desc(cache_desc: object) -> tuple[Placement, Geometry]:
    """Where a cache lies and what it looks like. Spec 6.1, 7.3."""
    desc = check_type("cache_desc", cache_desc, CacheDesc)
    placement = check_type("placement", desc.placement, CachePlacement)
    num_tensors = check_uint32("num_tensors", desc.num_tensors)
    shape = check_sequence("shape", desc.shape, int)
    if not num_tensors:
        raise invalid("num_tensors of cache_desc is 0: a cache has at least one tensor")
    geometry = Geometry.of(CacheKind.MIX, num_tensors, shape, nbytes_of(shape, desc.data_type))
    return Placement(placement), geometry


def parse_index(name: str, index: object) -> CacheKeyByIdAndIndex:
    """Where a transfer reaches into a peer. Spec 7.3."""
    given = check_type(name, index, CacheIndex)
    return CacheKeyByIdAndIndex(given.cluster_id, given.cache_id, given.batch_index)


def parse_cache(name: str, cache: object) -> int:
    """The id of a cache of ours, which is all that is looked at. Spec 7.4."""
    return check_int64("cache_id", check_type(name, cache, Cache).cache_id)


def parse_source(src_cache: object) -> int:
    """The id of a cache of ours to push from. Spec 7.4."""
    cache = check_type("src_cache", src_cache, Cache)
    desc = check_type("cache_desc of src_cache", cache.cache_desc, CacheDesc)
    if desc.placement != CachePlacement.kDevice:
        raise invalid(f"only a kDevice cache can be pushed, got {desc.placement}")
    return parse_cache("src_cache", cache)


def parse_blocks(
    key: CacheKeyByIdAndIndex, src_blocks: object, dst_blocks: object
) -> tuple[Sequence[int], Sequence[int]]:
    """Both lists of a transfer by blocks, to or from the cache of the key. Spec 7.4."""
    src = check_uint64_sequence("src_blocks", src_blocks)
    dst = check_uint64_sequence("dst_blocks", dst_blocks)
    if key.batch_index:
        raise invalid(f"{key} must have batch_index 0: blocks are named by src_blocks, dst_blocks")
    if not src:
        raise invalid("src_blocks is empty: name the blocks to move")
    if len(src) != len(dst):
        raise invalid(f"{len(src)} src_blocks do not pair with {len(dst)} dst_blocks")
    return src, dst


def _endpoints(name: str, ip_infos: object) -> tuple[Endpoint, ...]:
    endpoints = [
        Endpoint(check_type("ip", each.ip, str), check_uint16("port", each.port))
        for each in check_sequence(name, ip_infos, IpInfo)
    ]
    for endpoint in endpoints:
        if not is_ip_literal(endpoint.host):
            raise invalid(f"{name} has no IPv4 or IPv6 address, but {endpoint.host!r}")
    return tuple(endpoints)
