"""LLMDataDist: the life of a cluster, and its links. Spec 5."""

from __future__ import annotations

import atexit
import sys
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, ClassVar, cast, final

from llm_datadist.checks import (
    check_dict,
    check_int32,
    check_optional,
    check_sequence,
    check_type,
    check_uint64,
)
from llm_datadist.cluster_info import LLMClusterInfo
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.observe.log import get_logger
from llm_datadist.options import Options, parse_listens
from llm_datadist.running import forks
from llm_datadist.types import LLMRole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Self

    from llm_datadist.cache_manager import CacheManager
    from llm_datadist.cluster import Cluster
    from llm_datadist.core.pages import PoolUsage
    from llm_datadist.core.stats import ClusterStats
    from llm_datadist.directory.base import Directory
    from llm_datadist.directory.record import Record
    from llm_datadist.endpoint import Endpoint
    from llm_datadist.following.follower import Follower
    from llm_datadist.following.wants import Wants
    from llm_datadist.kv_cache_manager import KvCacheManager
    from llm_datadist.links.linker import Outcome, Target
    from llm_datadist.links.ranks import RankLinks
    from llm_datadist.links.table import LinkInfo
    from llm_datadist.places.places import AnyCluster
    from llm_datadist.types import Placement, RegisterMemStatus


@final
class LLMDataDist:
    """One cluster: a process that holds caches and links to others. Spec 5.

    One instance at a time may be initialised in a process (spec 5.1); it can be finalized and
    initialised again. Methods other than `init` and `finalize` may be called from any thread, at
    the same time. A forked child has to call `init` itself.

    A context manager, as an addition to the reference: leaving it finalizes. One that is dropped
    without that stays initialised, since peers may be using it: `llm_engine_instance` has it.

    Raises TypeError, ValueError for a role or an id that is none.
    """

    #: the one that is initialised in this process
    llm_engine_instance: ClassVar[LLMDataDist | None] = None

    def __init__(self, role: LLMRole, cluster_id: int) -> None:
        self._role = check_optional("role", role, LLMRole)
        self._cluster_id = check_uint64("cluster_id", cluster_id)
        self._cluster: AnyCluster | None = None
        self._cache_manager: CacheManager | None = None
        self._kv_cache_manager: KvCacheManager | None = None
        #: why it is not initialised, for messages
        self._why_not = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.finalize()

    @property
    def cluster_id(self) -> int:
        """The id that was chosen for this cluster. Spec 5."""
        return self._cluster_id

    def init(self, options: dict[str, str]) -> None:
        """Starts the cluster: listens when the options say where, ready to link. Spec 5.1.

        `options` comes from `LLMConfig.generate_options`, or is written by hand; unknown keys are
        ignored, the dict is not changed. A second call is a no-op; behind an interrupted `finalize`
        it waits for that end first.

        Raises TypeError, ValueError for malformed options; LLMException with LLM_PARAM_INVALID for
        options that cannot be, LLM_FAILED when the address to listen on cannot be had, descriptors
        have run out, or another instance of this process is initialised. (One that was dropped, of
        which the program has neither itself nor its manager any more, is finalized: a notebook's
        cell is run again.) After a failure `init` may be called again.
        """
        if self._cluster is not None and self._cluster.is_up:
            return
        self.finalize()  # what was interrupted is ended first
        _make_room()
        parsed = Options.parse(self._role, options)  # type: ignore[arg-type]  # None is refused there
        self._check_devices(parsed)
        # numpy, asyncio: not when the package is imported
        from llm_datadist.cache_manager import CacheManager
        from llm_datadist.kv_cache_manager import KvCacheManager
        from llm_datadist.places.places import open_cluster

        try:
            # first, so that whatever interrupts this leaves nothing that nobody ends
            forks.watch(self)
            _register_at_exit()
            LLMDataDist.llm_engine_instance = self
            self._cluster = cluster = open_cluster(self._cluster_id, parsed)
            cluster.start()
            if parsed.cache_manager:
                self._cache_manager = CacheManager(cluster)
            else:
                self._kv_cache_manager = KvCacheManager(cluster, parsed.role)
            self._why_not = ""
        except BaseException as error:
            self.finalize()
            if isinstance(error, OSError) and error.errno is not None:
                raise LLMException(f"cannot start: {error}", LLMStatusCode.LLM_FAILED) from error
            raise

    def finalize(self) -> None:
        """Ends all links, waits for running calls, frees everything. May be called again. Spec 5.2.

        Peers notice at once. Memory that was registered stays the caller's.
        """
        cluster, manager = self._cluster, self._cache_manager or self._kv_cache_manager
        if manager is not None:
            manager._detach()
        if cluster is not None:
            cluster.stop()
        # not before: what was interrupted can be called again
        if self._cluster is cluster:
            self._cluster = self._cache_manager = self._kv_cache_manager = None
        if LLMDataDist.llm_engine_instance is self:
            LLMDataDist.llm_engine_instance = None

    @property
    def cache_manager(self) -> CacheManager:
        """The caches of this cluster; the same object until `finalize`. Spec 5.3.

        Raises RuntimeError before `init`, LLMException when the options enable no cache manager.
        """
        return self._require_manager()[1]

    def link(self, comm_name: str, cluster_rank_info: dict[int, int], rank_table: str) -> int:
        """Begins a link that all its 2 to 4 members call for, in any order. Spec 5.8, 12.1-12.3.

        Returns its comm_id at once; `query_register_mem_status` tells when it can be used: when the
        last member has called, maybe minutes later. `cluster_rank_info` maps cluster ids to ranks,
        ascending. Members on one host find each other by name; for those on other hosts
        `rank_table` (JSON) has `host_ip`, an IP `server_id` or `device_ip`, and they listen on port
        LLM_DATADIST_LINK_BASE_PORT (61000) + device_id. `link_total_time` (120 s) bounds it.

        Raises RuntimeError before `init`, TypeError, ValueError; LLMException with
        LLM_PARAM_INVALID, LLM_LINK_FAILED (no rank table), LLM_FEATURE_NOT_ENABLED.
        """
        return self._require_ranks().link(comm_name, cluster_rank_info, rank_table)

    def unlink(self, comm_id: int) -> None:
        """Ends a rank-table link, or its preparation, once its transfers have ended. Spec 5.8.

        Raises RuntimeError before `init`, TypeError, ValueError; LLMException with
        LLM_NOT_YET_LINK for an unknown id, LLM_FEATURE_NOT_ENABLED.
        """
        self._require_ranks().unlink(check_uint64("comm_id", comm_id))

    def query_register_mem_status(self, comm_id: int) -> RegisterMemStatus:
        """How far a rank-table link has come: PREPARING, then OK or FAILED for good. Spec 5.8.

        Never blocks. Raises as `unlink`.
        """
        return self._require_ranks().status_of(check_uint64("comm_id", comm_id))

    @property
    def kv_cache_manager(self) -> KvCacheManager:
        """The caches of this cluster in the v1 mode; the same object until `finalize`. Spec 5.3.

        Raises RuntimeError before `init`, LLMException when the options enable the cache manager.
        """
        self._require_cluster()
        if self._kv_cache_manager is None:
            raise invalid("kv_cache_manager belongs to the v1 mode: use cache_manager")
        return self._kv_cache_manager

    def switch_role(self, role: LLMRole, switch_options: dict[str, str] | None = None) -> None:
        """Changes the role, and where this cluster listens. Spec 5.7.

        `switch_options` may have `llm.listenIpInfo`; the listener then moves there, and without it
        the cluster listens no more. Other entries are ignored. After a failure everything is as it
        was. A cluster that follows a fleet (`follow`) leaves it meanwhile, and all its links are
        ended, in order where peers agree; that may take `sync_kv_timeout` and 2 s. Whoever wants
        the new role links anew.

        Raises RuntimeError before `init`; KeyError, TypeError, ValueError for bad arguments;
        LLMException with LLM_EXIST_LINK while clusters are linked, LLM_PARAM_INVALID, LLM_FAILED
        when the address cannot be had, LLM_FEATURE_NOT_ENABLED where the options forbid it.
        """
        cluster = self._require_cluster()
        if role is None:
            raise KeyError("role is None: pass an LLMRole")
        check_type("role", role, LLMRole)
        options = check_dict(
            "switch_options", {} if switch_options is None else switch_options, str, str
        )
        listens = parse_listens(options)
        with cluster.switching():
            if not cluster.options.cache_manager:
                self._check_v1_switch(cluster, role, listens)
            follower = self.follower
            try:
                if follower is not None:
                    follower.stand_down(cluster.options.sync_timeout_s)
                cluster.switch_listening(listens)
                self._role = role
                if self._kv_cache_manager is not None:
                    self._kv_cache_manager._switch_role(role)
            finally:
                if follower is not None:
                    follower.stand_up()

    def follow(
        self,
        directory: Directory | str,
        wants: Wants | None = None,
        *,
        advertised: str = "",
        facts: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        ttl_s: float = 15.0,
    ) -> Follower:
        """Joins a fleet: announces this cluster in a directory, and links to whom it wants there.

        `directory` is one of `llm_datadist.directory`, or a word as `open_directory` takes it.
        Without `wants` nobody is linked to from here; others may link to this cluster. `advertised`
        is where others reach it, `host` or `host:port`; needed where it listens on every address.
        `facts` must be equal at two members that are linked; `labels` are what else there is to
        say. Who does not renew its record for `ttl_s` (1 to 3600) is taken for gone.

        Returns at once: all the rest happens in threads of the library's, and a directory that is
        gone changes nothing for links that live. Members that left are unlinked, a new start of one
        is linked in place of the old. Ends with `Follower.stop`, or `finalize`. An addition to the
        reference, see the guide A fleet.

        Raises RuntimeError before `init`, TypeError, ValueError for words that do not print or are
        too long; LLMException with LLM_PARAM_INVALID while it follows a fleet already, for a
        directory that nobody knows or where `advertised` is missing, LLM_FAILED without threads.
        """
        from llm_datadist.directory.record import check as check_record
        from llm_datadist.following.wants import Wants

        cluster = self._require_one_device()
        check_optional("wants", wants, Wants)
        if isinstance(directory, str):
            from llm_datadist.directory.opening import open_directory

            directory = open_directory(directory)
        check_type("advertised", advertised, str)
        said = check_dict("facts", {} if facts is None else facts, str, str)
        words = check_dict("labels", {} if labels is None else labels, str, str)
        known = {**cluster.membership.facts, **said}

        def record() -> Record:
            assert self._role is not None  # it has been initialised
            return cluster.membership.record(self._role, advertised, known, words)

        check_record(record(), ttl_s)
        return cluster.membership.follow(directory, wants, ttl_s, known, record)

    @property
    def follower(self) -> Follower | None:
        """What `follow` returned, until it is stopped; None without. An addition to the reference.

        Raises RuntimeError before `init`.
        """
        from llm_datadist.cluster import Cluster

        cluster = self._require_cluster()
        return cluster.membership.follower if isinstance(cluster, Cluster) else None

    def check_link_status(self, remote_cluster_id: int) -> None:
        """Of the v1 mode: returns when there is a live link to a cluster. Spec 5.3.

        Raises TypeError, ValueError; LLMException with LLM_NOT_YET_LINK, or LLM_PARAM_INVALID
        outside of the v1 mode.
        """
        cluster = self._require_cluster()
        if cluster.options.cache_manager:
            raise invalid("check_link_status belongs to the v1 mode: links() shows the live links")
        cluster.links.find(check_uint64("remote_cluster_id", remote_cluster_id))

    @property
    def listen_endpoint(self) -> Endpoint | None:
        """Where this cluster listens, with the port that was taken for 0; None if it does not.

        That of the first device, where there are several. An addition to the reference.
        """
        return next(iter(self.listen_endpoints), None)

    @property
    def listen_endpoints(self) -> tuple[Endpoint, ...]:
        """As `listen_endpoint`, one for each device; empty if the cluster does not listen."""
        return self._require_cluster().listen_endpoints

    def links(self) -> list[LinkInfo]:
        """The live links, each with the path of its bytes. An addition to the reference."""
        return self._require_cluster().links.infos()

    def pools(self) -> dict[Placement, tuple[PoolUsage, ...]]:
        """How full each configured memory pool is: free and used bytes, the largest free span.

        A `mem_pool_cfg` or `host_mem_pool_cfg` is one entry; a `buf_pool_cfg` has one for each size
        class and one for its general part. An addition to the reference. Raises RuntimeError before
        `init`.
        """
        return self._require_cluster().catalog.usage()

    def stats(self) -> ClusterStats:
        """This cluster at the moment: links, pools, caches, keys; immutable. Cheap, at any time.

        With `LLMConfig.metrics` also what operations did since `init`: bytes, segments, times,
        failures, waits. An addition to the reference, see the guide Observability. Raises
        RuntimeError before `init`.
        """
        return self._require_cluster().stats()

    def link_clusters(
        self, clusters: Sequence[LLMClusterInfo], timeout: int = 3000
    ) -> tuple[LLMStatusCode, list[LLMStatusCode]]:
        """Links to clusters that listen, all at once, each within `timeout` milliseconds. Spec 5.4.

        Returns the last status that is not LLM_SUCCESS, else LLM_SUCCESS, and one status per
        cluster: LLM_ALREADY_LINK, LLM_LINK_FAILED (nobody listens there, or no path to its memory
        works), LLM_TIMEOUT, LLM_PARAM_INVALID (not one remote address for each device; the options
        or devices of the two ends do not fit), LLM_FAILED (what listens there is no cluster). What
        failed leaves nothing behind on either end and is logged with its cause, which is also the
        log record's `reason`; what succeeded stays. An unset `remote_cluster_id` is learned from
        the peer. An empty list is (LLM_PARAM_INVALID, []).

        Raises RuntimeError before `init`, TypeError, ValueError, LLMException for bad arguments.
        """
        cluster = self._require_cluster()
        infos = _check_clusters(clusters, timeout)
        for info in infos:
            if not cluster.options.local_comm_res and not info.local_ip_info_list:
                raise invalid(f"local_ip_info_list is empty for {info}: call append_local_ip_info")
        outcomes = cluster.link([_target(info) for info in infos], timeout / 1000)
        return self._report("link", infos, outcomes)

    def unlink_clusters(
        self, clusters: Sequence[LLMClusterInfo], timeout: int = 3000, force: bool = False
    ) -> tuple[LLMStatusCode, list[LLMStatusCode]]:
        """Ends links, once the transfers on them have ended, with the peers' consent. Spec 5.5.

        With `force` nobody is asked or waited for: this end drops the link at once, transfers that
        run on it fail, and the peer sees it end. Unlinking what is not linked is LLM_SUCCESS.
        Statuses as for `link_clusters`: LLM_UNLINK_FAILED (the peer cannot be reached),
        LLM_TIMEOUT (the link is kept), LLM_PARAM_INVALID.

        Raises RuntimeError before `init`, TypeError, ValueError, LLMException for bad arguments.
        """
        cluster = self._require_cluster()
        infos = _check_clusters(clusters, timeout)
        check_type("force", force, bool)
        for info in infos:
            check_uint64("remote_cluster_id", info.remote_cluster_id)
        targets = [_target(info) for info in infos]
        return self._report("unlink", infos, cluster.unlink(targets, timeout / 1000, force=force))

    def _check_devices(self, options: Options) -> None:
        """What options say of devices that this mode, or this cluster, cannot be."""
        if options.cache_manager and options.devices:
            raise invalid(
                f"{options.num_devices} devices: the cache manager has one. Several are for the v1 "
                "mode (leave enable_cache_manager out, and use kv_cache_manager) and for "
                "llm_datadist.cpp.LlmDataDist; otherwise start a process for each"
            )
        if options.named_cluster_id not in (None, self._cluster_id):
            raise invalid(
                f"llm.ClusterInfo is of cluster {options.named_cluster_id}, this is cluster "
                f"{self._cluster_id}"
            )

    def _check_v1_switch(
        self, cluster: AnyCluster, role: LLMRole, listens: Sequence[Endpoint]
    ) -> None:
        if not cluster.options.enable_switch_role:
            raise LLMException(
                "switching roles is off: set LLMConfig.enable_switch_role",
                LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            )
        if role == self._role:
            raise invalid(f"the role is {role} already")
        if role == LLMRole.PROMPT and not listens:
            raise invalid("switching to PROMPT needs llm.listenIpInfo in switch_options")

    def _forget_parent(self) -> AnyCluster | None:
        """For running/forks.py."""
        cluster, manager = self._cluster, self._cache_manager or self._kv_cache_manager
        self._cluster = self._cache_manager = self._kv_cache_manager = None
        self._why_not = f": {forks.FORKED}"
        if LLMDataDist.llm_engine_instance is self:
            LLMDataDist.llm_engine_instance = None
        if manager is not None:
            manager._detach()
        return cluster

    def _require_manager(self) -> tuple[Cluster, CacheManager]:
        cluster = self._require_cluster()
        if self._cache_manager is None:
            raise invalid("the cache manager is off: set LLMConfig.enable_cache_manager")
        return cast("Cluster", cluster), self._cache_manager  # which has one device

    def _require_one_device(self) -> Cluster:
        from llm_datadist.cluster import Cluster

        cluster = self._require_cluster()
        if not isinstance(cluster, Cluster):
            raise LLMException(
                "a cluster of several devices follows no fleet: use link_clusters",
                LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            )
        return cluster

    def _require_ranks(self) -> RankLinks:
        cluster = self._require_manager()[0]
        if cluster.options.transfer_backend is not None:
            raise LLMException(
                "rank-table links are not for a transfer_backend: use link_clusters",
                LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            )
        return cluster.ranks

    def _require_cluster(self) -> AnyCluster:
        if self._cluster is None:
            raise RuntimeError(f"llm datadist is not initialized{self._why_not}")
        return self._cluster

    def _report(
        self, verb: str, infos: Sequence[LLMClusterInfo], outcomes: Sequence[Outcome]
    ) -> tuple[LLMStatusCode, list[LLMStatusCode]]:
        for info, outcome in zip(infos, outcomes, strict=True):
            if outcome.status is not LLMStatusCode.LLM_SUCCESS:
                get_logger().error(
                    "cluster %d could not %s %s: %s (%s)",
                    self._cluster_id, verb, info, outcome.reason, outcome.status,
                    extra={"reason": outcome.reason},
                )  # fmt: skip
        statuses = [outcome.status for outcome in outcomes]
        failures = [status for status in statuses if status is not LLMStatusCode.LLM_SUCCESS]
        if not statuses:
            return LLMStatusCode.LLM_PARAM_INVALID, []
        return failures[-1] if failures else LLMStatusCode.LLM_SUCCESS, statuses


def _check_clusters(clusters: object, timeout: object) -> Sequence[LLMClusterInfo]:
    if check_int32("timeout", timeout) <= 0:
        raise invalid(f"timeout must be greater than 0 milliseconds, got {timeout}")
    return check_sequence("clusters", clusters, LLMClusterInfo)


def _target(info: LLMClusterInfo) -> Target:
    from llm_datadist.links.linker import Target

    ours = len(info.local_ip_info_list)
    return Target(info.remote_cluster_id, tuple(info.remote_endpoints), ours)


def _make_room() -> None:
    """Only one is initialised at a time. Raises LLMException(LLM_FAILED) when another one is."""
    other = LLMDataDist.llm_engine_instance
    if other is None:
        return
    manager = other._cache_manager or other._kv_cache_manager
    # each is known to a variable here, and to the one place where the library keeps it
    known = object()
    once = sys.getrefcount(known) + 1
    is_held = manager is not None and sys.getrefcount(manager) > once
    if sys.getrefcount(other) > once or is_held:
        raise LLMException(
            "another LLMDataDist of this process is initialised: finalize it first "
            "(LLMDataDist.llm_engine_instance.finalize())",
            LLMStatusCode.LLM_FAILED,
        )
    get_logger().warning(
        "cluster %d was dropped without finalize, which is done now", other.cluster_id
    )
    other.finalize()


@cache
def _register_at_exit() -> None:
    """Once: whatever is taken out again leaves its place there."""
    atexit.register(_shutdown_handler)


def _shutdown_handler() -> None:
    """At exit: finalizes what is still initialised."""
    instance = LLMDataDist.llm_engine_instance
    if instance is not None:
        with suppress(LLMException):
            instance.finalize()
