"""The options of Initialize, and what they make of a cluster. Spec 7.1, 7.2; seed 002."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from llm_datadist import option_keys as key
from llm_datadist.checks import check_dict, check_type
from llm_datadist.cluster import Cluster
from llm_datadist.cpp.types import LlmRole
from llm_datadist.errors import LLMException, invalid
from llm_datadist.observe.log import get_logger
from llm_datadist.options import Options
from llm_datadist.places import places
from llm_datadist.pool_config import BufPoolConfig, PoolConfig
from llm_datadist.types import LLMRole

if TYPE_CHECKING:
    from llm_datadist.links.filing import Siblings
    from llm_datadist.places.places import AnyCluster

#: "ip:port" or "[ipv6]:port" to listen on, one for each device, with ";" between them; without it
#: nobody can link to this cluster. Seed 002 wants it of every Prompt, later documents of none: a
#: Prompt may push over links of its own making
OPTION_LISTEN_IP_INFO: Final = key.CPP_LISTEN_IP_INFO
#: required: a number; for a process with several devices several, with ";" between them
OPTION_DEVICE_ID: Final = key.CPP_DEVICE_ID
#: milliseconds that bound each pull and push; 1000 unless given
OPTION_SYNC_CACHE_WAIT_TIME: Final = key.SYNC_KV_TIMEOUT
#: JSON: size and size classes of the memory that AllocateCache takes from
OPTION_BUF_POOL_CFG: Final = key.BUF_POOL_CFG
#: "1" allows SetRole; "0" unless given
OPTION_ENABLE_SET_ROLE: Final = key.ENABLE_SWITCH_ROLE
#: not needed; what the reference could not read, as no JSON, lets no link be made
OPTION_LOCAL_COMM_RES: Final = key.LOCAL_COMM_RES
#: "hixl": as in the reference, SetRole then cannot change the address
OPTION_TRANSFER_BACKEND: Final = key.TRANSFER_BACKEND
#: not needed; with OPTION_TRANSFER_BACKEND both are read by Initialize
OPTION_GLOBAL_RESOURCE_CONFIG: Final = key.GLOBAL_RESOURCE_CONFIG

#: what C++ programs have no choice about
_FORCED: Final = {key.ENABLE_CACHE_MANAGER: "1", key.ENABLE_REMOTE_CACHE_ACCESSIBLE: "1"}


def parse_role(role: object) -> LLMRole:
    """What `role` is in Python's interface. Raises TypeError, LLMException. Spec 7.4."""
    given = check_type("role", role, LlmRole)
    if given is LlmRole.kEnd:
        raise invalid("role is kEnd: pass kPrompt, kDecoder or kMix")
    return LLMRole(given)


def parse_options(role: object, options: object) -> Options:
    """The options that a program gave, read and checked. Spec 7.1, 7.2.

    Raises TypeError unless they are a dict of str to str, and ValueError or LLMException
    (LLM_PARAM_INVALID) for what is missing or cannot be.
    """
    given = check_dict("options", options, str, str)
    if not given.get(OPTION_DEVICE_ID):
        raise invalid(f"OPTION_DEVICE_ID ({OPTION_DEVICE_ID}) is required")
    if given.get(OPTION_ENABLE_SET_ROLE, "0") not in ("0", "1"):
        raise invalid(
            f"OPTION_ENABLE_SET_ROLE must be 0 or 1, got {given[OPTION_ENABLE_SET_ROLE]!r}"
        )
    return Options.parse(parse_role(role), {**given, **_FORCED})


def open_cluster(cluster_id: int, options: Options) -> AnyCluster:
    """A cluster with memory to allocate from, for each of its devices.

    Raises LLMException(LLM_OUT_OF_MEMORY).
    """
    return places.open_cluster(cluster_id, options, _open_one)


def _open_one(cluster_id: int, options: Options, siblings: Siblings | None) -> Cluster:
    """A cluster of one device. Raises LLMException(LLM_OUT_OF_MEMORY).

    Programs need not configure a pool to allocate (seed 002). What they get then is as large as the
    machine's memory: address space, of which pages are taken as they are touched.
    """
    if options.device_pool is not None or options.buf_pool not in (None, BufPoolConfig()):
        return Cluster(cluster_id, options, siblings)
    pages, page_nbytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    everything = PoolConfig(pages * page_nbytes)
    try:
        return Cluster(cluster_id, replace(options, device_pool=everything), siblings)
    except LLMException as error:  # many programs never allocate; AllocateCache tells the others
        get_logger().info("cluster %d has no memory to allocate from: %s", cluster_id, error)
        return Cluster(cluster_id, options, siblings)
