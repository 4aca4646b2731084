"""LlmDataDist: a cluster, as C++ programs know it. Spec 7.4; seed 002."""

from __future__ import annotations

import weakref
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, TypeVar, final

from llm_datadist.checks import (
    check_dict,
    check_int64,
    check_list,
    check_type,
    check_uint64,
)
from llm_datadist.cpp.arguments import (
    parse_desc,
    parse_targets,
    parse_timeout_s,
)
from llm_datadist.cpp.options import open_cluster, parse_options, parse_role
from llm_datadist.cpp.transfers import LlmTransfers
from llm_datadist.cpp.types import Cache, LlmRole, RegisterCfg
from llm_datadist.device_options import parse_listens
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.running import forks
from llm_datadist.types import Placement

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llm_datadist.cpp.call import Call
    from llm_datadist.cpp.status import Status
    from llm_datadist.cpp.types import CacheDesc, ClusterInfo
    from llm_datadist.endpoint import Endpoint
    from llm_datadist.links.linker import Outcome, Target
    from llm_datadist.links.table import LinkInfo
    from llm_datadist.places.places import AnyCluster

T = TypeVar("T")

_OK = LLMStatusCode.LLM_SUCCESS


@final
class LlmDataDist(LlmTransfers):
    """One cluster of C++ shape. Any number of them may be initialised in a process. Spec 7.4.

    Every method returns a status, 0 (LLM_SUCCESS) when all was done, and logs why when it was not;
    what C++ returns through a reference follows the status in a tuple. LLM_FAILED is the answer of
    a cluster that is not initialised. Methods raise nothing but TypeError, for arguments of a type
    that C++ would not compile.

    Caches are both continuous and blocks caches: dim 0 of the shape counts the batch rows that
    PullKvCache, PushKvCache and CopyKvCache move, and the blocks that the other three move. Peers
    may use them. Clusters of Python's LLMDataDist can be linked if they have remote access enabled.

    With several devices (OPTION_DEVICE_ID, spec 7.6) each cache is on all of them, and each call is
    done on all, device i with device i of the peer, or fails.

    Methods but Initialize and Finalize may be called from any thread, at the same time. An object
    that is dropped, or left over when the program ends, is finalized. A forked child has to call
    Initialize itself.
    """

    def __init__(self, cluster_id: int, role: LlmRole) -> None:
        """Does no work yet. Raises TypeError."""
        super().__init__(check_type("cluster_id", cluster_id, int))
        self._role = check_type("role", role, LlmRole)
        self._end: weakref.finalize[[], LlmDataDist] | None = None

    # -- life --

    def Initialize(self, options: dict[str, str]) -> Status:
        """Starts the cluster: listens when the options say where, ready to link. Spec 7.1, 7.4.

        `options` is keyed by the constants OPTION_*, of which OPTION_DEVICE_ID is required; other
        keys are ignored. A second call is a no-op; behind an interrupted Finalize it waits for that
        end first. After a failure there may be another.

        Returns LLM_PARAM_INVALID for options or a role that cannot be, LLM_FAILED when the address
        to listen on cannot be had, LLM_OUT_OF_MEMORY when a configured pool cannot.
        """
        with self._call("Initialize") as call:
            if self._cluster is None or not self._cluster.is_up:
                self.Finalize()  # what was interrupted is ended first
                cluster_id = check_uint64("cluster_id", self._cluster_id)
                forks.watch(self)
                try:
                    self._cluster = cluster = open_cluster(
                        cluster_id, parse_options(self._role, options)
                    )
                    self._end = weakref.finalize(self, cluster.stop)
                    cluster.start()
                except BaseException:
                    self.Finalize()
                    raise
        return call.status

    def Finalize(self) -> None:
        """Ends all links, waits for running transfers, frees what was allocated. Spec 7.4.

        Does nothing when not initialised. Initialize may be called again; ids then start anew.
        """
        cluster, end = self._cluster, self._end
        if cluster is not None:
            cluster.stop()
        # not before: what was interrupted can be called again
        if self._cluster is cluster:
            self._cluster = None
        if end is not None:
            end.detach()

    def SetRole(self, role: LlmRole, options: dict[str, str] | None = None) -> Status:
        """Changes the role, and where this cluster listens. Spec 5.7, 7.4; seed 002.

        OPTION_LISTEN_IP_INFO in `options` says where; without it the cluster listens no more. After
        a failure everything is as it was.

        Returns LLM_PARAM_INVALID, LLM_FEATURE_NOT_ENABLED unless the cluster was initialised with
        OPTION_ENABLE_SET_ROLE "1", LLM_EXIST_LINK while clusters are linked, LLM_FAILED when the
        address cannot be had.
        """
        with self._call("SetRole") as call:
            cluster = self._require_cluster()
            parse_role(role)
            listens = parse_listens(check_dict("options", options or {}, str, str))
            if not cluster.options.enable_switch_role:
                raise LLMException(
                    "setting the role is off: initialise with OPTION_ENABLE_SET_ROLE 1",
                    LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
                )
            with cluster.switching():
                cluster.switch_listening(listens)
                self._role = role
        return call.status

    @property
    def listen_endpoint(self) -> Endpoint | None:
        """Where this cluster listens, with the port that was taken for 0; None if it does not.

        That of the first device, where there are several. An addition to the reference.
        """
        return next(iter(self.listen_endpoints), None)

    @property
    def listen_endpoints(self) -> tuple[Endpoint, ...]:
        """As `listen_endpoint`, one for each device; empty if the cluster does not listen."""
        return () if self._cluster is None else self._cluster.listen_endpoints

    def links(self) -> list[LinkInfo]:
        """The live links, each with the path of its bytes. An addition to the reference."""
        return [] if self._cluster is None else self._cluster.links.infos()

    # -- links --

    def LinkLlmClusters(
        self, clusters: Sequence[ClusterInfo], timeout_in_millis: int = 1000
    ) -> tuple[Status, list[Status]]:
        """Links to clusters that listen, all at once, each within the timeout. Spec 5.4, 7.4.

        Returns the last status that is not LLM_SUCCESS, and one status per cluster:
        LLM_ALREADY_LINK, LLM_LINK_FAILED (nobody listens there, or no path to its memory works),
        LLM_TIMEOUT, LLM_PARAM_INVALID (not one remote address for each device; options or devices
        of the two do not fit), LLM_FAILED (what listens there is no cluster). What succeeded stays
        linked. For an address that is no literal, a timeout of 0 or less, and no clusters at all it
        returns (LLM_PARAM_INVALID, []), and nobody is called.
        """
        rets: list[Status] = []
        with self._call("LinkLlmClusters") as call:
            cluster = self._require_cluster()
            targets, timeout_s = parse_targets(clusters), parse_timeout_s(timeout_in_millis)
            rets = _report(call, targets, cluster.link(targets, timeout_s))
        return call.status, rets

    def UnlinkLlmClusters(
        self,
        clusters: Sequence[ClusterInfo],
        timeout_in_millis: int = 1000,
        force_flag: bool = False,
    ) -> tuple[Status, list[Status]]:
        """Ends links, once the transfers on them have ended, with the peers' consent. Spec 5.5.

        With `force_flag` nobody is asked or waited for, and no address is needed. Unlinking what is
        not linked is LLM_SUCCESS. Returns as LinkLlmClusters, with LLM_UNLINK_FAILED for a peer
        that cannot be reached; after LLM_TIMEOUT the link is kept.
        """
        rets: list[Status] = []
        with self._call("UnlinkLlmClusters") as call:
            cluster = self._require_cluster()
            targets, timeout_s = parse_targets(clusters), parse_timeout_s(timeout_in_millis)
            force = check_type("force_flag", force_flag, bool)
            rets = _report(call, targets, cluster.unlink(targets, timeout_s, force=force))
        return call.status, rets

    # -- caches --

    def RegisterKvCache(
        self, cache_desc: CacheDesc, addrs: list[int], cfg: RegisterCfg | None = None
    ) -> tuple[Status, int]:
        """Makes memory of the caller's a cache: one address per tensor, and of several devices
        those of the first one first. Spec 6.4, 7.4, 7.6.

        The memory stays the caller's, who keeps it until UnregisterKvCache. Returns the cache id,
        -1 with LLM_PARAM_INVALID for addresses or a description that cannot be.
        """
        return self._make(partial(self._register, cache_desc, addrs, cfg), itemgetter(1))

    def _register(
        self, cache_desc: CacheDesc, addrs: list[int], cfg: RegisterCfg | None
    ) -> tuple[Status, int]:
        cache_id = -1
        with self._call("RegisterKvCache") as call:
            cluster = self._require_cluster()
            placement, geometry = parse_desc(cache_desc)
            check_type("cfg", RegisterCfg() if cfg is None else cfg, RegisterCfg)
            if not check_list("addrs", addrs, int):
                raise invalid("addrs is empty: give one address per tensor")
            if 0 in addrs:
                raise invalid(f"addrs[{addrs.index(0)}] is 0: every tensor needs an address")
            entry = cluster.catalog.register(geometry, addrs, placement, is_remote_accessible=True)
            cache_id = entry.cache_id
        return call.status, cache_id

    def UnregisterKvCache(self, cache_id: int) -> Status:
        """Forgets a cache; an unknown id is no error. Spec 6.4, 7.4.

        Waits for this cluster's own transfers that use the memory. Returns LLM_TIMEOUT when they do
        not end within OPTION_SYNC_CACHE_WAIT_TIME; the cache then stays registered.
        """
        with self._call("UnregisterKvCache") as call:
            cluster = self._require_cluster()
            known = check_int64("cache_id", cache_id)
            cluster.catalog.unregister(known, cluster.options.sync_timeout_s)
        return call.status

    def AllocateCache(self, cache_desc: CacheDesc) -> tuple[Status, Cache]:
        """A cache in the library's memory, until DeallocateCache. Spec 6.3, 7.4, 8.2; seed 002.

        The memory is what OPTION_BUF_POOL_CFG configures, else as much as the machine has; it holds
        anything at first. Returns the cache with its id and the address of each tensor, those of
        the first device first; an empty
        one with LLM_OUT_OF_MEMORY, and with LLM_PARAM_INVALID for a description that cannot be or a
        placement (kHost) that has no pool.
        """
        return self._make(partial(self._allocate, cache_desc), lambda made: made[1].cache_id)

    def _allocate(self, cache_desc: CacheDesc) -> tuple[Status, Cache]:
        cache = Cache()
        with self._call("AllocateCache") as call:
            cluster = self._require_cluster()
            placement, geometry = parse_desc(cache_desc)
            _require_pool(cluster, placement)
            entry = cluster.catalog.allocate(geometry, placement, ())
            cache = Cache(entry.cache_id, entry.layout.addrs.tolist(), cache_desc)
        return call.status, cache

    def DeallocateCache(self, cache_id: int) -> Status:
        """Frees an allocated cache. Spec 6.5, 7.4; seed 002.

        Nothing happens to a registered, unknown or deallocated cache (D28).
        """
        with self._call("DeallocateCache") as call:
            cluster = self._require_cluster()
            cluster.catalog.deallocate(check_int64("cache_id", cache_id))
        return call.status

    # -- parts of the above --

    def _make(self, make: Callable[[], T], id_of: Callable[[T], int]) -> T:
        cluster = self._cluster
        return make() if cluster is None else cluster.make(make, id_of)

    def _forget_parent(self) -> AnyCluster | None:
        """For running/forks.py."""
        cluster, self._cluster = self._cluster, None
        if self._end is not None:
            self._end.detach()
        return cluster


def _report(call: Call, targets: Sequence[Target], outcomes: Sequence[Outcome]) -> list[Status]:
    """The statuses; the last failure is the call's, and its log names all. Spec 5.4."""
    failures = [
        (outcome.status, f"cluster {target.cluster_id}: {outcome.reason} ({outcome.status})")
        for target, outcome in zip(targets, outcomes, strict=True)
        if outcome.status is not _OK
    ]
    if failures:
        call.fail(int(failures[-1][0]), "; ".join(cause for _, cause in failures))
    return [int(outcome.status) for outcome in outcomes]


def _require_pool(cluster: AnyCluster, placement: Placement) -> None:
    if placement in cluster.catalog.pools:
        return
    if placement is Placement.HOST:
        raise invalid("caches are allocated with placement kDevice; register host memory")
    raise LLMException(
        "the system refused to reserve memory at Initialize: set OPTION_BUF_POOL_CFG",
        LLMStatusCode.LLM_OUT_OF_MEMORY,
    )
