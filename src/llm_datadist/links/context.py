"""What all links of a cluster share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping
    from concurrent.futures import Executor

    from llm_datadist.core.link import Identity
    from llm_datadist.observe.recorder import Recorder
    from llm_datadist.owner.service import Serving
    from llm_datadist.running.gate import Gate
    from llm_datadist.running.movers import Movers
    from llm_datadist.transport.base import Transport
    from llm_datadist.transport.same_host import SameHost
    from llm_datadist.transport.shields import Shields


@dataclass(frozen=True)
class Context:
    """The cluster's parts that sessions, the linker and the listener use."""

    me: Identity
    loop: asyncio.AbstractEventLoop
    gate: Gate
    transports: Mapping[str, Transport]
    #: what peers ask is answered by this
    serving: Serving
    #: threads that verify paths, look names up, and wait for calls to end
    waiters: Executor
    shields: Shields
    #: where peers of this host are met; None when that path is not to be had
    same_host: SameHost | None
    #: compares what is moved by checksum; None: it is not compared
    checking: Movers | None
    sync_timeout_s: float
    #: with a transfer backend each end links and unlinks for itself (spec 5.6)
    is_one_way: bool
    #: the names (`Control.name`) of control connections that we called, and that we answered
    called: set[bytes]
    answered: set[bytes]
    #: None when metrics are off
    recorder: Recorder | None
