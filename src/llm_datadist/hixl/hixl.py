"""Hixl: an engine, as programs of the reference's next interface know it."""

from __future__ import annotations

import itertools
import weakref
from functools import partial
from typing import TYPE_CHECKING, final

from llm_datadist.checks import INT64_MAX, check_type
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.hixl.arguments import (
    parse_notice,
    parse_pieces,
    parse_range,
    parse_remote,
    parse_server,
    parse_timeout_s,
)
from llm_datadist.hixl.call import Call
from llm_datadist.hixl.engine import Engine
from llm_datadist.hixl.names import EngineName
from llm_datadist.hixl.options import EngineOptions
from llm_datadist.hixl.types import (
    AsyncConnectStatus,
    GetTransferStatusArgs,
    NotifyDesc,
    TransferArgs,
    TransferStatus,
    as_int,
)
from llm_datadist.running import forks

if TYPE_CHECKING:
    from llm_datadist.core.stats import ClusterStats
    from llm_datadist.hixl.status import Status
    from llm_datadist.hixl.types import MemDesc, MemType, TransferOp, TransferOpDesc, TransferResult
    from llm_datadist.links.table import LinkInfo

#: how long deregister_mem waits for transfers of this engine that use the memory
_DEREGISTER_S = 10.0


@final
class Hixl:
    """One engine. Any number of them may be initialised in a process.

    Methods return a status, 0 (SUCCESS) when all was done, and log why when it was not; what else a
    call returns follows it in a tuple. FAILED is the answer of an engine that is not initialised.
    They raise nothing but TypeError, for arguments of a wrong type.

    Methods but `initialize` may be called from any thread, at the same time. An object that is
    dropped, or left over when the program ends, is finalized. A forked child has to call
    `initialize` itself.
    """

    def __init__(self) -> None:
        """Does no work yet."""
        self._engine: Engine | None = None
        self._end: weakref.finalize[[], Hixl] | None = None
        #: numbers the engines that it has been: handles and requests of one name nothing of another
        self._lives = itertools.count()

    # -- life --

    def initialize(self, local_engine: str, options: dict[str, str] | None = None) -> Status:
        """Starts the engine, which is called `local_engine` by others: `ip:port` or `[ipv6]:port`.

        It listens there; without a port, or with one of 0 or less, it only connects to others. The
        name is to be unique among all that connect. `options` is keyed by the constants OPTION_*.
        A second call does nothing. Returns PARAM_INVALID for a name or options that cannot be,
        FAILED when the address cannot be had.
        """
        with Call("initialize", local_engine) as call:
            if self._engine is None or not self._engine.is_up:
                self.finalize()  # what was interrupted is ended first
                text = check_type("local_engine", local_engine, str)
                name = EngineName.parse(text, "local_engine")
                parsed = EngineOptions.parse(name, {} if options is None else options)
                forks.watch(self)
                try:
                    self._engine = engine = Engine(name, parsed, next(self._lives))
                    self._end = weakref.finalize(self, engine.stop)
                    engine.start()
                except BaseException:
                    self.finalize()
                    raise
        return call.status

    def finalize(self) -> None:
        """Ends all connections and transfers, and forgets what was registered.

        What runs has a second to end, then it is cut. Nothing is moved any more when this returns,
        but for a WRITE's that was cut, as transfer_sync says.
        Does nothing when not initialised. `initialize` may be called again.
        """
        engine, end = self._engine, self._end
        if engine is not None:
            engine.stop()
        # not before: what was interrupted can be called again
        if self._engine is engine:
            self._engine = None
        if end is not None:
            end.detach()

    # -- memory --

    def register_mem(self, mem_desc: MemDesc, mem_type: MemType) -> tuple[Status, int]:
        """Memory that transfers may use, any part of it: (status, handle).

        Peers reach it from here on, those that are connected already too, unless it is
        `local_only`. It stays the caller's, who keeps it until deregister_mem. The same address and
        length again is the same handle. Handles are above 0. Returns PARAM_INVALID for memory that
        cannot be, RESOURCE_EXHAUSTED for more than 65,536 ranges.
        """
        handle = 0
        with self._call("register_mem") as call:
            engine = self._require()
            handle = engine.memory.register(parse_range(mem_desc, mem_type))
        return call.status, handle

    def deregister_mem(self, handle: int) -> Status:
        """Peers and transfers do not reach that memory any more.

        Waits for what this engine moves of it. An unknown handle, or one a second time, is SUCCESS;
        0 is PARAM_INVALID. Returns TIMEOUT when what uses it does not end within 10 s; it stays
        registered then: disconnect first.
        """
        with self._call("deregister_mem") as call:
            engine, number = self._require(), as_int("handle", handle)
            if number == 0:
                raise invalid("the handle is 0: register_mem has failed")
            if 0 < number <= INT64_MAX:
                engine.memory.deregister(number, _DEREGISTER_S)
        return call.status

    # -- connections --

    def connect(self, remote_engine: str, timeout_in_millis: int = 1000) -> Status:
        """Connects to an engine that listens: `ip:port` or `[ipv6]:port`.

        Returns PARAM_INVALID, TIMEOUT, ALREADY_CONNECTED, RESOURCE_EXHAUSTED (the pool of channels)
        and FAILED when nobody listens there.
        """
        with self._call("connect") as call:
            engine, name = self._require(), parse_server(remote_engine)
            engine.connections.connect(name, parse_timeout_s(timeout_in_millis))
        return call.status

    def disconnect(self, remote_engine: str, timeout_in_millis: int = 1000) -> Status:
        """Ends a connection that this engine made, and all transfers over it.

        They fail, and nothing of them is moved any more when this returns, but for a WRITE's, as
        transfer_sync says. Returns PARAM_INVALID, NOT_CONNECTED, and TIMEOUT when the peer did not
        agree in time: the connection was cut then.
        """
        with self._call("disconnect") as call:
            engine, name = self._require(), parse_server(remote_engine)
            engine.disconnect(name, parse_timeout_s(timeout_in_millis))
        return call.status

    def connect_async(self, remote_engine: str, timeout_in_millis: int = 1000) -> Status:
        """Has a thread connect; get_async_connect_status tells what came of it.

        Tasks for one engine run in order, those for others side by side. The time-out begins with
        the task. Returns PARAM_INVALID, RESOURCE_EXHAUSTED when the queue is full.
        """
        with self._call("connect_async") as call:
            engine, name = self._require(), parse_server(remote_engine)
            timeout_s = parse_timeout_s(timeout_in_millis)
            engine.connecting.connect(name, partial(engine.connections.connect, name, timeout_s))
        return call.status

    def disconnect_async(self, remote_engine: str, timeout_in_millis: int = 1000) -> Status:
        """Has a thread disconnect, as `connect_async` connects."""
        with self._call("disconnect_async") as call:
            engine, name = self._require(), parse_server(remote_engine)
            timeout_s = parse_timeout_s(timeout_in_millis)
            engine.connecting.disconnect(name, partial(engine.disconnect, name, timeout_s))
        return call.status

    def get_async_connect_status(self, remote_engine: str) -> tuple[Status, AsyncConnectStatus]:
        """What has become of the newest task for that engine: (status, AsyncConnectStatus)."""
        status = AsyncConnectStatus.NOT_CONNECT
        with self._call("get_async_connect_status") as call:
            status = self._require().connecting.status_of(parse_server(remote_engine))
        return call.status, status

    def get_all_async_connect_status(self) -> tuple[Status, dict[str, AsyncConnectStatus]]:
        """The same of all engines that there was a task for, by name."""
        statuses: dict[str, AsyncConnectStatus] = {}
        with self._call("get_all_async_connect_status") as call:
            known = self._require().connecting.statuses()
            statuses = {str(name): status for name, status in known.items()}
        return call.status, statuses

    # -- transfers --

    def transfer_sync(
        self,
        remote_engine: str,
        op: TransferOp,
        op_descs: list[TransferOpDesc],
        timeout_in_millis: int = 1000,
    ) -> Status:
        """Moves memory between the two engines, and returns when all of it has been moved.

        Each piece lies within memory that is registered here, and in memory that is registered
        there and not `local_only`. Pieces have no defined order. After a failure what was to be
        filled may hold anything. Nothing of a READ is moved any more then; of a WRITE the receiver
        may end the one system call that it is in (docs/hixl.md, Known gaps).

        Returns PARAM_INVALID (with the address in the log), NOT_CONNECTED, TIMEOUT,
        RESOURCE_EXHAUSTED, and FAILED when the peer died or the connection was ended.
        """
        with self._call("transfer_sync") as call:
            engine, name = self._require(), parse_remote(remote_engine)
            timeout_s = parse_timeout_s(timeout_in_millis)
            engine.transfer(name, parse_pieces(op, op_descs, engine.memory.ranges), timeout_s)
        return call.status

    def transfer_async(
        self,
        remote_engine: str,
        op: TransferOp,
        op_descs: list[TransferOpDesc],
        args: TransferArgs | None = None,
    ) -> tuple[Status, int]:
        """The same in a thread: (status, request). It has no time-out: disconnect ends it.

        What get_transfer_status says of the request is the only word of its end. Requests have no
        defined order among each other. Returns PARAM_INVALID, NOT_CONNECTED, and RESOURCE_EXHAUSTED
        when 65,536 requests were not asked for, or the system has no threads to give.
        """
        number = 0
        with self._call("transfer_async") as call:
            engine, name = self._require(), parse_remote(remote_engine)
            given = check_type("args", TransferArgs() if args is None else args, TransferArgs)
            user_data = as_int("user_data", given.user_data)
            pieces = parse_pieces(op, op_descs, engine.memory.ranges)
            engine.connections.require_or_make(name)
            number = engine.requests.begin(name, pieces, user_data)
        return call.status, number

    def get_transfer_status(self, req: int) -> tuple[Status, TransferStatus]:
        """What has become of a request: (status, TransferStatus).

        COMPLETED and FAILED are told once: the request is not known any more then, which is
        PARAM_INVALID, with FAILED.
        """
        status: TransferStatus | None = TransferStatus.FAILED
        with self._call("get_transfer_status") as call:
            engine, number = self._require(), as_int("req", req)
            status = engine.requests.status_of(number)
            if status is None:
                raise invalid(
                    f"there is no request {number}: its end was told already, or it never was"
                )
        return call.status, TransferStatus.FAILED if status is None else status

    def get_all_transfer_status(
        self, args: GetTransferStatusArgs | None = None
    ) -> tuple[Status, list[TransferResult]]:
        """What has become of all requests, oldest first; those that have ended are told once."""
        results: list[TransferResult] = []
        with self._call("get_all_transfer_status") as call:
            engine = self._require()
            given = check_type(
                "args", GetTransferStatusArgs() if args is None else args, GetTransferStatusArgs
            )
            most = as_int("max_query_count", given.max_query_count)
            if most < 0:
                raise invalid(f"max_query_count must not be negative, got {most}")
            is_skipped = check_type("skip_waiting", given.skip_waiting, bool)
            results = engine.requests.results(most, is_waiting_skipped=is_skipped)
        return call.status, results

    # -- notices --

    def send_notify(
        self, remote_engine: str, notify: NotifyDesc, timeout_in_millis: int = 1000
    ) -> Status:
        """Sends a short text, which the peer's program gets with get_notifies.

        Behind a transfer_sync that returned SUCCESS its bytes are there before the text. Returns
        PARAM_INVALID, NOT_CONNECTED, TIMEOUT (it may arrive nevertheless), FAILED when 4,096 texts
        of this connection are unread there, UNSUPPORTED at a cluster of LLM-DataDist.
        """
        with self._call("send_notify") as call:
            engine, name = self._require(), parse_remote(remote_engine)
            timeout_s = parse_timeout_s(timeout_in_millis)
            engine.notify(name, parse_notice(notify), timeout_s)
        return call.status

    def get_notifies(self) -> tuple[Status, list[NotifyDesc]]:
        """All texts that peers have sent and nobody has got yet, in the order of their arrival."""
        notices: list[NotifyDesc] = []
        with self._call("get_notifies") as call:
            notices = [NotifyDesc(*notice) for notice in self._require().take_notices()]
        return call.status, notices

    # -- additions to the reference --

    def links(self) -> list[LinkInfo]:
        """The live connections, each with the path of its bytes. An addition to the reference."""
        return [] if self._engine is None else self._engine.cluster.links.infos()

    def stats(self) -> ClusterStats:
        """What there is, and was counted so far. An addition to the reference.

        Raises RuntimeError before `initialize`.
        """
        return self._require().cluster.stats()

    # -- parts of the above --

    def _call(self, name: str) -> Call:
        engine = self._engine
        return Call(name, "that is not initialised" if engine is None else engine.name)

    def _require(self) -> Engine:
        engine = self._engine
        if engine is None:
            raise LLMException("call initialize first", LLMStatusCode.LLM_FAILED)
        return engine

    def _forget_parent(self) -> Engine | None:
        """For running/forks.py."""
        engine, self._engine = self._engine, None
        if self._end is not None:
            self._end.detach()
        return engine
