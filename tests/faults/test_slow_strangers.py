"""Strangers who say it slowly or not at all: they are shed, with link security and without."""

from __future__ import annotations

import json
import os
import select
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import numpy as np
from made_up import authentic, greetings, tls_option
from wire import Wire, hello

from llm_datadist import LLMStatusCode
from llm_datadist import cpp as c
from llm_datadist.core import messages as m
from llm_datadist.testing.cluster import Bytes, Node, NodeProcess, addrs_of, make_array
from llm_datadist.testing.timing import eventually, takes_at_most

if TYPE_CHECKING:
    from pathlib import Path

#: how long a listener lets a stranger say nothing of use
GREETING_S = 10.0
SECRET = "a secret of more than sixteen bytes"
SHAPE = (2, 8, 4096)


class Cluster:
    """One that others link to, or that links to it; over tcp, with a cache."""

    def __init__(self, cluster_id: int, security: str, address: str = "") -> None:
        self.datadist = c.LlmDataDist(cluster_id, c.LlmRole.kMix)
        options = {c.OPTION_DEVICE_ID: "0", "llm_datadist.Path": "tcp"}
        if security:
            options["llm_datadist.LinkSecurity"] = security
        if address:
            options[c.OPTION_LISTEN_IP_INFO] = address
        assert self.datadist.Initialize(options) == c.LLM_SUCCESS
        self.array: Bytes = make_array(SHAPE, cluster_id)
        desc = c.CacheDesc(
            num_tensors=SHAPE[0], data_type=c.DataType.DT_INT8, shape=list(SHAPE[1:])
        )
        status, cache_id = self.datadist.RegisterKvCache(desc, addrs_of(self.array))
        assert status == c.LLM_SUCCESS
        self.cache = c.Cache(cache_id, addrs_of(self.array), desc)

    def link(self, port: int) -> int:
        info = c.ClusterInfo(
            remote_cluster_id=1,
            local_ip_infos=[c.IpInfo("127.0.0.1", 0)],
            remote_ip_infos=[c.IpInfo("127.0.0.1", port)],
        )
        self.datadist.UnlinkLlmClusters([info], 2000, True)
        return self.datadist.LinkLlmClusters([info], 2000)[1][0]

    def pulls(self, cluster_id: int) -> bool:
        self.array[:] = 0
        blocks = list(range(SHAPE[1]))
        index = c.CacheIndex(cluster_id, 1)
        status = self.datadist.PullKvBlocks(index, self.cache, blocks, blocks)
        return status == c.LLM_SUCCESS and np.array_equal(self.array, make_array(SHAPE, cluster_id))


_owners: list[Cluster] = []


def own(_: Node, cluster_id: int, security: str) -> int:
    _owners.append(Cluster(cluster_id, security, "127.0.0.1:0"))
    endpoint = _owners[-1].datadist.listen_endpoint
    assert endpoint is not None
    return endpoint.port


def descriptors(_: Node) -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_byte_now_and_then_does_not_keep_a_stranger_connected(
    victim: NodeProcess, tmp_path: Path
) -> None:
    """The time is for the whole greeting. Links and new ones work meanwhile."""
    securities = ["", json.dumps({"secret": SECRET}), tls_option(tmp_path)]
    with ExitStack() as stack:
        pullers = []
        for number, security in enumerate(securities):
            port = victim.call(own, number + 1, security)
            pullers.append((Cluster(number + 11, security), number + 1, port))
            stack.callback(pullers[-1][0].datadist.Finalize)
            assert pullers[-1][0].link(port) == LLMStatusCode.LLM_SUCCESS
            assert pullers[-1][0].pulls(number + 1)
        before = victim.call(descriptors)
        wires, slow = [], []
        for security, (_, _, port) in zip(securities, pullers, strict=True):
            greeting = greetings(security)[0] + m.encode(hello(timeout_ms=3000))
            strangers = [stack.enter_context(Wire.dial(port)) for _ in range(8)]
            if "secret" in security:  # who is known is to say more than that
                strangers += [stack.enter_context(authentic(port, SECRET)) for _ in range(2)]
            for wire in strangers[:4]:
                wire.send_bytes(greeting[:20])
            wires += strangers
            slow += [(wire, greeting) for wire in strangers[4:6]]
        left = {wire.socket for wire in wires}
        end = time.monotonic() + 1.2 * GREETING_S
        at = 0
        while left and time.monotonic() < end:
            for wire, greeting in slow:
                if wire.socket in left:
                    with suppress(ConnectionError):
                        wire.send_bytes(greeting[at : at + 1])
            at += 1
            for puller, cluster_id, port in pullers:
                with takes_at_most(1.0):
                    assert puller.pulls(cluster_id)
                if at % 5 == 0:
                    with takes_at_most(1.0):
                        assert puller.link(port) == LLMStatusCode.LLM_SUCCESS
            readable, _, _ = select.select(list(left), [], [], 0.5)
            for sock in readable:
                with suppress(ConnectionError):
                    if sock.recv(4096):
                        continue
                left.discard(sock)
        assert not left, f"{len(left)} of {len(wires)} strangers are still there"
        assert eventually(lambda: victim.call(descriptors) <= before + 6)
