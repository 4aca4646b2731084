"""What all sessions of an engine share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping
    from concurrent.futures import Executor

    from llm_datadist.core.link import Identity
    from llm_datadist.engine.catalog import Catalog
    from llm_datadist.engine.groups import Groups
    from llm_datadist.engine.links import Links
    from llm_datadist.observe.recorder import Recorder
    from llm_datadist.transport.base import Transport
    from llm_datadist.transport.movers import Movers
    from llm_datadist.transport.shield import Shields


@dataclass(frozen=True)
class Context:
    """The engine's parts that sessions, services and the listener use."""

    me: Identity
    catalog: Catalog
    links: Links
    groups: Groups
    transports: Mapping[str, Transport]
    loop: asyncio.AbstractEventLoop
    #: threads that help with large transfers
    movers: Movers
    #: threads that send large answers
    workers: Executor
    #: threads that fetch what peers push
    fetchers: Executor
    #: threads that verify paths, look names up, and wait for transfers to end
    waiters: Executor
    shields: Shields
    #: what is moved is compared by checksum
    verifies: bool
    sync_timeout_s: float
    #: with a transfer backend each end links and unlinks for itself (spec 5.6)
    is_one_way: bool
    #: None when metrics are off
    recorder: Recorder | None
    #: by the monotonic clock
    started_at: float
