"""The program that `mixture` runs: `python -m soak.medley SECONDS SEED`; prints what came of it."""

from __future__ import annotations

import faulthandler
import json
import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, cast

from llm_datadist import LLMRole, LLMStatusCode
from llm_datadist.testing.cluster import Node, NodeProcess
from soak.medley_peer import Notes, offer, pull_until, serve
from soak.member import Member

THREADS = 32
SYNC_S = 5.0
AROUND_S = 50.0
POOL = json.dumps({"memory_size": 8 << 20, "page_shift": 12})


def main(seconds: float, seed: int) -> None:
    faulthandler.dump_traceback_later(seconds + AROUND_S, exit=True)
    logger = logging.getLogger("LLM_DATADIST")
    logger.addHandler(logging.NullHandler())
    logger.setLevel(logging.CRITICAL)
    notes = Notes()
    with ExitStack() as stack:
        peers = [stack.enter_context(NodeProcess()) for _ in range(2)]
        settings: dict[str, Any] = {
            "enable_remote_cache_accessible": True,
            "sync_kv_timeout": int(SYNC_S * 1000),
        }
        ports = [
            peer.call(serve, index + 1, THREADS, path, settings)
            for index, (peer, path) in enumerate(zip(peers, ("tcp", "cma"), strict=True))
        ]
        node = Node()
        node.start(
            LLMRole.MIX, 3, listen_ip_info="127.0.0.1:0", mem_pool_cfg=POOL,
            host_mem_pool_cfg=POOL, **settings,
        )  # fmt: skip
        offer(node)
        for index, port in enumerate(ports):
            assert node.link(port, index + 1, 5000) == LLMStatusCode.LLM_SUCCESS
        end = time.monotonic() + seconds
        for index, peer in enumerate(peers):
            peer.begin(pull_until, end, seed + index)
        members = [Member(node, notes, ports, thread, seed, SYNC_S) for thread in range(THREADS)]
        with ThreadPoolExecutor(THREADS) as pool:
            for call in [pool.submit(member.run, end) for member in members]:
                call.result()
        for index, peer in enumerate(peers):
            right, wrong = cast("tuple[int, list[str]]", peer.result())
            notes.counts["peers pull LLM_SUCCESS"] += right
            for what in wrong:
                notes.complain(f"peer {index + 1}: {what}")
        for index, port in enumerate(ports):  # whatever happened, the pairs link and work again
            node.unlink(port, index + 1, 5000, force=True)
            if node.link(port, index + 1, 5000) != LLMStatusCode.LLM_SUCCESS:
                notes.complain(f"cluster {index + 1} does not link in the end")
            elif members[0].pull_blocks(index + 1) is not LLMStatusCode.LLM_SUCCESS:
                notes.complain(f"cluster {index + 1} cannot be pulled from in the end")
        node.stop()
    faulthandler.cancel_dump_traceback_later()
    report = {
        "counts": notes.counts,
        "wrong": notes.wrong,
        "worst_over_s": notes.worst_over_s,
        "operations": [*Member.OPERATIONS, "peers pull"],
    }
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
