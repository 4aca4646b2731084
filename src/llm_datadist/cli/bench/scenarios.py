"""What else has a price: planning, linking, importing, many readers at once, layers one by one."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from llm_datadist import BlocksCacheKey, LayerSynchronizer, LLMRole, LLMStatusCode
from llm_datadist import TransferWithCacheKeyConfig as KeyConfig
from llm_datadist.cli.bench import ours
from llm_datadist.cli.bench.contest import require_memory
from llm_datadist.cli.bench.contestant import Job, Owner, Pair, wait_for_end
from llm_datadist.cli.bench.rivals import Memcpy
from llm_datadist.cli.bench.workload import SHAPES, CacheMemory, Workload
from llm_datadist.cli.failure import CommandError
from llm_datadist.core.geometry import CacheKind, Geometry, Layout
from llm_datadist.core.plan import blocks_to_blocks
from llm_datadist.cpp import OPTION_DEVICE_ID, OPTION_LISTEN_IP_INFO, LlmDataDist, LlmRole
from llm_datadist.memory import native

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

_LLAMA = SHAPES["llama3-8b"]


class Figure(NamedTuple):
    """One line of a scenario's outcome."""

    name: str
    value: float
    unit: str


def plan(rounds: int) -> Iterator[Figure]:
    """From block lists to the vectors of a system call."""
    medians = {}
    for num_segments in (16_384, 262_144):
        count = num_segments // _LLAMA.num_tensors
        shape = replace(_LLAMA, num_blocks=2 * count, num_moved=count)
        geometry = Geometry(
            CacheKind.BLOCKS, shape.num_tensors, shape.num_blocks, shape.block_nbytes
        )
        layout = Layout.at(
            geometry, [index * shape.tensor_nbytes for index in range(shape.num_tensors)]
        )
        src, dst = (blocks.tolist() for blocks in shape.blocks())
        seconds = []
        for _ in range(max(rounds, 5)):
            begun = time.perf_counter()
            segments = blocks_to_blocks(layout, src, layout, dst)
            for window in segments.windows(native.IOV_MAX):
                window.src_iovecs(), window.dst_iovecs()
            seconds.append(time.perf_counter() - begun)
        medians[num_segments] = statistics.median(seconds)
        yield Figure(f"plan {len(segments):,} segments", medians[num_segments] * 1e3, "ms")
    yield Figure("16 times as many segments take", medians[262_144] / medians[16_384], "x")


def link(rounds: int) -> Iterator[Figure]:
    """link_clusters on one host: one cluster, and 64 in one call."""
    owner = Owner(_own_clusters, 64)
    job = Job(_LLAMA)
    try:
        datadist = ours.start(LLMRole.DECODER, 1000, job)
        try:
            infos = [ours.info(cluster_id, port) for cluster_id, port in enumerate(owner.greeting)]
            medians = {}
            for count in (1, 64):
                seconds = []
                for _ in range(rounds):
                    begun = time.perf_counter()
                    status, _ = datadist.link_clusters(infos[:count], 30_000)
                    seconds.append(time.perf_counter() - begun)
                    if status is not LLMStatusCode.LLM_SUCCESS:
                        raise CommandError(f"linking {count} clusters ended with {status}")
                    datadist.unlink_clusters(infos[:count], 30_000)
                medians[count] = statistics.median(seconds)
                what = "one cluster" if count == 1 else f"{count} clusters"
                yield Figure(f"link {what}", medians[count] * 1e3, "ms")
            yield Figure("64 take as long as", medians[64] / medians[1], "x one")
        finally:
            datadist.finalize()
    finally:
        owner.close()


def fan_out(rounds: int, threads: int) -> Iterator[Figure]:
    """One prefill, eight decode processes that pull at once; beside a memcpy of as many bytes."""
    readers = 8
    require_memory((readers + 3) * _LLAMA.cache_nbytes, "close what else takes memory")
    job = Job(_LLAMA, path="cma", threads=threads)
    with ExitStack() as stack:
        owner = Owner(ours.own, job)
        stack.callback(owner.close)
        pulls = [Owner(_pull_on_demand, job, *owner.greeting, 10 + n) for n in range(readers)]
        for reader in pulls:
            stack.callback(reader.close)
        ceiling = stack.enter_context(Pair("memcpy", Memcpy, job, {}))
        shares, slowest = [], []
        for _ in range(rounds):
            ceiling_s = statistics.median(ceiling.measure(2))
            spans = _pull_together(pulls)
            whole_s = max(end for _, end in spans) - min(begun for begun, _ in spans)
            shares.append(readers * ceiling_s / whole_s)
            speeds = [1 / (end - begun) for begun, end in spans]
            slowest.append(min(speeds) / statistics.mean(speeds))
        yield Figure("8 readers together, of memcpy's speed", statistics.median(shares), "x")
        yield Figure("the slowest reader, of the mean", statistics.median(slowest), "x")


def layers(rounds: int, threads: int) -> Iterator[Figure]:
    """A push of 32 layers while the caller computes: what is left to wait for at the end."""
    job = Job(_LLAMA, operation="push_blocks", path="cma", threads=threads)
    owner = Owner(ours.own, job)
    try:
        datadist = ours.start(LLMRole.DECODER, 2, job)
        try:
            ours.link(datadist, 1, owner.greeting[0])
            memory = CacheMemory(_LLAMA)
            cache = ours.register(datadist, _LLAMA, memory, as_rows=False)
            num_layers = _LLAMA.num_tensors // 2
            src, dst = (blocks.tolist() for blocks in _LLAMA.blocks())
            every = range(num_layers)

            def send(compute: Callable[[], None]) -> float:
                """The seconds from the last layer's computation to the end of the transfer."""
                computed = _Computed(num_layers)
                config = KeyConfig(BlocksCacheKey(1, 0), every, every)
                task = datadist.cache_manager.transfer_cache_async(
                    cache, computed, [config], src, dst
                )
                for layer in every:
                    compute()
                    computed.done[layer].set()
                begun = time.perf_counter()
                if task.synchronize(60_000) is not LLMStatusCode.LLM_SUCCESS:
                    raise CommandError("the layer-wise transfer failed")
                return time.perf_counter() - begun

            send(lambda: None)
            alone = statistics.median(send(lambda: None) for _ in range(rounds)) / num_layers
            left = statistics.median(send(lambda: time.sleep(2 * alone)) for _ in range(rounds))
            yield Figure("one layer's transfer", alone * 1e3, "ms")
            yield Figure("left when the last layer is computed", left * 1e3, "ms")
            yield Figure("in layers", left / alone, "layers")
        finally:
            datadist.finalize()
    finally:
        owner.close()


class _Computed(LayerSynchronizer):
    """Lets a layer go when it has been computed."""

    def __init__(self, num_layers: int) -> None:
        self.done = [threading.Event() for _ in range(num_layers)]

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return self.done[layer_index].wait(60)


def _own_clusters(pipe: Connection, count: int) -> None:
    """Several clusters that listen, in one process."""
    clusters = [LlmDataDist(cluster_id, LlmRole.kPrompt) for cluster_id in range(count)]
    options = {OPTION_DEVICE_ID: "0", OPTION_LISTEN_IP_INFO: "127.0.0.1:0"}
    for cluster in clusters:
        cluster.Initialize(options)
    endpoints = [cluster.listen_endpoint for cluster in clusters]
    pipe.send([endpoint.port for endpoint in endpoints if endpoint is not None])
    wait_for_end(pipe)


def _pull_on_demand(pipe: Connection, job: Job, port: int, cache_id: int, reader_id: int) -> None:
    workload: Workload = job.workload
    memory = CacheMemory(workload)
    datadist = ours.start(LLMRole.DECODER, reader_id, job)
    ours.link(datadist, 1, port)
    cache = ours.register(datadist, workload, memory, as_rows=False)
    src, dst = (blocks.tolist() for blocks in workload.blocks())
    gc.freeze()
    pipe.send(cache_id)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        begun = time.monotonic()
        datadist.cache_manager.pull_blocks(BlocksCacheKey(1, 0), cache, src, dst)
        pipe.send((begun, time.monotonic()))


def _pull_together(readers: list[Owner]) -> list[tuple[float, float]]:
    for reader in readers:
        reader.pipe.send("pull")
    spans = []
    for reader in readers:
        if not reader.pipe.poll(60):
            raise CommandError("a reader did not answer")
        spans.append(reader.pipe.recv())
    return spans
