"""One message of each type, or two where a field may be left out, to be recorded as frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from llm_datadist.core import messages as m
from llm_datadist.core.packed import pack_layers
from llm_datadist.core.registry import KeyName
from llm_datadist.core.remote_keys import pack_keys
from llm_datadist.core.stats import (
    ClusterStats,
    HeldKey,
    Histogram,
    LinkEvents,
    LinkStats,
    OperationStats,
    PoolStats,
    WaitStats,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_INSTANCE = bytes(range(16))
_TOKEN = bytes(range(16, 32))
_NONCE = bytes(range(48, 64))
_OFFERS = {"cma": b"\x01\x02", "tcp": b"\x03"}
_PROBE = m.ProbeTarget(0x7F00_0000_1000, bytes(range(32, 48)), 0x7F00_0000_2000, 2**62 + 1)
_INFO = m.CacheInfo(
    7, 1, 2, 512, 32768, True, False, 2**62 + 3, 0x7F00_0000_3000, bytes(range(16)),
    pack_keys({KeyName(5, 1): 2, KeyName(6, 1, is_prefix=True): 3}),
)  # fmt: skip
_LAYOUT = m.LayoutInfo(
    pack_layers(["layers.0", 1]),
    (4, 2, 8),
    512,
    16,
    128,
    27,
    "LBHND",
    [2**26, 8192, 4096, 256, 2],
)
_COLUMNS = bytes(range(48))
_TEETH = bytes(range(64))
_TIMES = Histogram((3, *(0 for _ in Histogram().counts[2:]), 1), 12.5)

_STATS = ClusterStats(
    cluster_id=1,
    uptime_s=60.5,
    num_links=1,
    num_caches=2,
    num_keys=3,
    is_counting=True,
    oldest_key=HeldKey(7, 1.5, 5, 1, True),
    links=(LinkStats(2, "tcp", "linked", "cma: other host", "192.0.2.1:26000", 4),),
    pools=(PoolStats("HOST", "all", 2**30, 4096, 2**29),),
    operations=(
        OperationStats(
            "pull_blocks", 2, "tcp", 3, (("LLM_TIMEOUT", 1),), 2**20, 64,
            _TIMES, _TIMES, _TIMES, _TIMES,
        ),
    ),
    waits=(WaitStats("stream", _TIMES),),
    link_events=(LinkEvents("tcp", 2, 1),),
    num_silent=4,
    num_half_open=5,
    num_turned_away=6,
)  # fmt: skip


def samples() -> Iterator[m.Message]:
    """In the order of their tags. A new type of message is added here."""
    hello = m.Hello(m.PROTOCOL_VERSION, 1, _INSTANCE, True, False, 1000, _OFFERS, _PROBE)
    yield hello
    yield msgspec.structs.replace(hello, group="ranks", nonce=_NONCE)
    yield msgspec.structs.replace(hello, device_index=2, num_devices=4, bundle=_TOKEN)
    yield m.Welcome(m.PROTOCOL_VERSION, 2, _INSTANCE, _TOKEN, _OFFERS, _PROBE)
    yield m.Ready("cma")
    yield m.Unusable("cma", "Operation not permitted", True)
    yield m.Linked("tcp")
    yield m.Refused(5, "clusters 1 and 2 are linked already")
    yield m.DialBack(4)
    yield m.Bye()
    yield m.ByeDone()
    yield m.Forget(_INSTANCE, _NONCE)
    yield m.Attach(_TOKEN, True)
    yield m.Attached()
    yield m.Moved()
    yield m.Vouch(bytes(range(32)))
    yield m.Vouched(bytes(range(32)), True)
    yield m.Resolve(7, 0, 0, False)
    yield m.Resolve(None, 5, 1, True)
    yield m.Resolved(_INFO, 2)
    yield m.Resolved(msgspec.structs.replace(_INFO, layout=_LAYOUT, is_counted=True), 2)
    yield m.ListCaches()
    yield m.Caches([_INFO])
    yield m.Read(7, 2**62 + 3, 1000, _COLUMNS)
    yield m.Read(7, 2**62 + 3, 1000, _COLUMNS, (5, 1, False, 2))
    yield m.Sending(2**20)
    yield m.UseUp(7, 2, 0, 64)
    yield m.Fetch(7, 2**62 + 3, 9, 2**62 + 5, 0x7F00_0000_4000, 1000, 12345.5, _COLUMNS)
    yield m.Fetch(None, 0, 9, 2**62 + 5, 0x7F00_0000_4000, 1000, 12345.5, _COLUMNS)
    yield m.Fetch(
        7, 2**62 + 3, 9, 2**62 + 5, 0x7F00_0000_4000, 1000, 12345.5, _COLUMNS, _TEETH, 256
    )
    yield m.Done()
    yield m.Digest(7, 2**62 + 3, 1000, _COLUMNS)
    yield m.Digested(0xFEDC_BA98_7654_3210)
    yield m.AskStats()
    yield m.Stats(_STATS)
    yield m.ListExports("nixl")
    yield m.Exports(b"\x04\x05")
    yield m.Notify("done", "block 7 is there")
