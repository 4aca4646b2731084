"""`hixl`: an engine's beginning and end, its memory, its options. Spec H.1 to H.3."""

from __future__ import annotations

import gc
import multiprocessing as mp
import socket
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hixl_engine import LONG_MS, Engine, engine, engines, range_of, whole

from llm_datadist import hixl as h
from llm_datadist.hixl import MemDesc, MemType
from llm_datadist.testing.cluster import free_port, make_array
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from collections.abc import Callable

READ, WRITE = h.TransferOp.READ, h.TransferOp.WRITE


@pytest.mark.shows("engine.names")
def test_names_and_numbers_are_the_documented_ones() -> None:
    assert [h.SUCCESS, h.PARAM_INVALID, h.TIMEOUT, h.NOT_CONNECTED, h.ALREADY_CONNECTED] == [
        0, 103900, 103901, 103902, 103903,
    ]  # fmt: skip
    assert [h.NOTIFY_FAILED, h.UNSUPPORTED, h.RESOURCE_EXHAUSTED, h.FAILED] == [
        103904, 103905, 203900, 503900,
    ]  # fmt: skip
    assert list(h.MemType) == [0, 1]
    assert (h.MemType.MEM_DEVICE, h.TransferOp.READ, h.TransferOp.WRITE) == (0, 0, 1)
    assert [each.name for each in h.TransferStatus] == ["WAITING", "COMPLETED", "TIMEOUT", "FAILED"]
    assert [each.name for each in h.AsyncConnectStatus] == [
        "NOT_CONNECT", "CONNECT_PENDING", "CONNECTING", "CONNECTED", "CONNECT_FAILED",
        "DISCONNECT_PENDING", "DISCONNECTING",
    ]  # fmt: skip
    assert [*h.FeatureType] == [0, 1]
    assert h.OPTION_AUTO_CONNECT == "AutoConnect"
    assert all(hasattr(h, name) for name in h.__all__)


@pytest.mark.shows("engine.types")
def test_values_have_the_documented_fields_and_defaults() -> None:
    desc = MemDesc(8, 16)
    assert (desc.addr, desc.len, desc.local_only) == (8, 16, False)
    desc.local_only = True
    assert desc == MemDesc(8, 16, True)
    assert h.TransferArgs().user_data == 0
    args = h.GetTransferStatusArgs()
    assert (args.max_query_count, args.skip_waiting) == (0xFFFFFFFF, False)
    notice = h.NotifyDesc("name", "text")
    assert (notice.name, notice.notify_msg) == ("name", "text")


@pytest.mark.shows("engine.types")
@pytest.mark.parametrize(
    "make",
    [
        lambda: MemDesc("8", 16),  # type: ignore[arg-type]
        lambda: MemDesc(8, 16.0),  # type: ignore[arg-type]
        lambda: MemDesc(True, 16),
        lambda: MemDesc(8, 16, 1),  # type: ignore[arg-type]
        lambda: h.TransferOpDesc(8, None, 16),  # type: ignore[arg-type]
        lambda: h.TransferArgs("tag"),  # type: ignore[arg-type]
        lambda: h.GetTransferStatusArgs(None),  # type: ignore[arg-type]
        lambda: h.GetTransferStatusArgs(1, 1),  # type: ignore[arg-type]
        lambda: h.NotifyDesc(b"name", "text"),  # type: ignore[arg-type]
        lambda: h.NotifyDesc("name", None),  # type: ignore[arg-type]
        lambda: h.get_capability("AUTO_CONNECT"),  # type: ignore[arg-type]
    ],
)
def test_values_of_wrong_types_cannot_be_made(make: Callable[[], object]) -> None:
    with pytest.raises(TypeError):
        make()


@pytest.mark.shows("engine.get_capability")
def test_capabilities_are_told_without_an_engine() -> None:
    assert h.get_capability(h.FeatureType.AUTO_CONNECT) == (h.SUCCESS, h.FEATURE_SUPPORTED)
    assert h.get_capability(h.FeatureType.CLIENT_SERVER_COMM) == (h.SUCCESS, 1)
    assert h.get_capability(2) == (h.SUCCESS, h.FEATURE_NOT_SUPPORTED)
    assert h.get_capability(-1) == (h.PARAM_INVALID, h.FEATURE_NOT_SUPPORTED)


@pytest.mark.shows("engine.initialize")
@pytest.mark.parametrize("form", ["{}:{}", "{}", "{}:0", "{}:-1"])
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_an_engine_listens_where_its_name_says_and_else_nowhere(host: str, form: str) -> None:
    port = free_port()
    one, other = h.Hixl(), Engine()
    try:
        assert one.initialize(form.format(host, port)) == h.SUCCESS
        other.start(listens=False)
        ret = other.hixl.connect(f"{host}:{port}", LONG_MS)
        assert ret == (h.SUCCESS if form == "{}:{}" else h.FAILED)
    finally:
        one.finalize()
        other.stop()


@pytest.mark.shows("engine.initialize")
@pytest.mark.parametrize(
    "name",
    ["", "localhost:5000", "1.2.3", "::1", "[127.0.0.1]:5", "1.2.3.4:65536", "1.2.3.4:x", "a b"],
)
def test_a_name_that_is_no_address_is_refused(name: str) -> None:
    hixl = h.Hixl()
    assert hixl.initialize(name) == h.PARAM_INVALID
    assert hixl.connect("127.0.0.1:9") == h.FAILED


@pytest.mark.shows("engine.initialize")
def test_a_second_initialize_does_nothing() -> None:
    with engine() as one:
        range_ = one.add()
        assert one.hixl.initialize("nonsense") == h.SUCCESS
        assert one.handle_of(range_) > 0
        one.connect(one.name)


@pytest.mark.shows("engine.initialize")
def test_an_address_that_is_taken_fails_and_may_be_tried_again() -> None:
    hixl = h.Hixl()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        name = f"127.0.0.1:{taken.getsockname()[1]}"
        assert hixl.initialize(name) == h.FAILED
    assert hixl.initialize(name) == h.SUCCESS
    hixl.finalize()


@pytest.mark.shows("engine.initialize")
def test_wrong_types_raise() -> None:
    hixl = h.Hixl()
    for arguments in ((1,), (None,), ("127.0.0.1", 1), ("127.0.0.1", {"AutoConnect": 1})):
        with pytest.raises(TypeError):
            hixl.initialize(*arguments)
    with engine() as one:
        for call in (one.hixl.connect, one.hixl.disconnect, one.hixl.connect_async):
            for wrong in ((None,), (1, 2), ("127.0.0.1:9", "1000")):
                with pytest.raises(TypeError):
                    call(*wrong)
        with pytest.raises(TypeError):
            one.hixl.register_mem(4096, MemType.MEM_HOST)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            one.hixl.register_mem(MemDesc(4096, 1), 1)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            one.hixl.deregister_mem("1")  # type: ignore[arg-type]


@pytest.mark.shows("engine.initialize", "engine.finalize")
def test_without_an_engine_every_call_has_failed() -> None:
    hixl, name = h.Hixl(), "127.0.0.1:9"

    def statuses() -> list[object]:
        desc, notice = MemDesc(4096, 1), h.NotifyDesc("", "")
        return [
            hixl.register_mem(desc, MemType.MEM_HOST), hixl.deregister_mem(1), hixl.connect(name),
            hixl.disconnect(name), hixl.connect_async(name), hixl.disconnect_async(name),
            hixl.get_async_connect_status(name), hixl.get_all_async_connect_status(),
            hixl.transfer_sync(name, READ, []), hixl.transfer_async(name, READ, []),
            hixl.get_transfer_status(1), hixl.get_all_transfer_status(),
            hixl.send_notify(name, notice), hixl.get_notifies(),
        ]  # fmt: skip

    failed = h.FAILED
    expected = [
        (failed, 0), failed, failed, failed, failed, failed,
        (failed, h.AsyncConnectStatus.NOT_CONNECT), (failed, {}), failed, (failed, 0),
        (failed, h.TransferStatus.FAILED), (failed, []), failed, (failed, []),
    ]  # fmt: skip
    assert statuses() == expected
    assert hixl.initialize("127.0.0.1") == h.SUCCESS
    hixl.finalize()
    hixl.finalize()
    assert statuses() == expected


@pytest.mark.shows("engine.several")
def test_engines_of_one_process_move_between_each_other(path: str) -> None:
    with engines(3, path) as (a, b, c):
        ranges = [each.add(seed=index) for index, each in enumerate((a, b, c))]
        a.connect(b.name)
        b.connect(c.name)
        c.connect(a.name)
        landing = b.add()
        assert b.read(c.name, landing, ranges[2]) == h.SUCCESS
        assert a.write(b.name, ranges[0], ranges[1]) == h.SUCCESS
        assert c.read(a.name, ranges[2], ranges[0]) == h.SUCCESS
        assert b.bytes_of(landing) == make_array((4096,), 2).tobytes()
        assert b.bytes_of(ranges[1]) == c.bytes_of(ranges[2]) == a.bytes_of(ranges[0])


@pytest.mark.shows("engine.finalize")
def test_an_engine_that_is_dropped_is_finalized() -> None:
    with engine() as client:
        dropped = Engine()
        name = dropped.start()
        client.connect(name)
        del dropped
        gc.collect()
        with socket.create_server(("127.0.0.1", int(name.rpartition(":")[2]))):
            pass


#: what a program forgets to finalize
left_behind = h.Hixl()


def leave_one_behind(name: str) -> None:
    assert left_behind.initialize(name) == h.SUCCESS


@pytest.mark.shows("engine.finalize")
def test_a_process_ends_that_has_finalized_nothing() -> None:
    process = mp.get_context("spawn").Process(
        target=leave_one_behind, args=(f"127.0.0.1:{free_port()}",)
    )
    process.start()
    process.join(30)
    assert process.exitcode == 0


# -- memory --


@pytest.mark.shows("engine.register_mem")
def test_the_same_memory_again_is_the_same_handle() -> None:
    array = make_array((4096,), 1)
    desc = MemDesc(*range_of(array))
    with engine() as one:
        ret, handle = one.hixl.register_mem(desc, MemType.MEM_HOST)
        assert (ret, one.hixl.register_mem(desc, MemType.MEM_HOST)) == (0, (0, handle))
        part = MemDesc(desc.addr, desc.len - 1)
        ret, other = one.hixl.register_mem(part, MemType.MEM_HOST)
        assert ret == h.SUCCESS
        assert other not in (0, handle)
        for changed, kind in (
            (MemDesc(desc.addr, desc.len, True), MemType.MEM_HOST),
            (desc, MemType.MEM_DEVICE),
        ):
            assert one.hixl.register_mem(changed, kind) == (h.PARAM_INVALID, 0)
        assert one.hixl.deregister_mem(handle) == h.SUCCESS
        ret, new = one.hixl.register_mem(MemDesc(*range_of(array)), MemType.MEM_DEVICE)
        assert ret == h.SUCCESS
        assert new not in (0, handle, other)


@pytest.mark.shows("engine.register_mem")
@pytest.mark.parametrize(
    ("addr", "nbytes"),
    [
        (0, 8),
        (-1, 8),
        (4096, 0),
        (4096, -1),
        (2**64 - 8, 9),
        (2**64, 1),
        (4096, 2**63),
        (4096, 2**64),
    ],
)
def test_memory_that_cannot_be_is_refused(addr: int, nbytes: int) -> None:
    with engine() as one:
        ret = one.hixl.register_mem(MemDesc(addr, nbytes), MemType.MEM_HOST)
        assert ret == (h.PARAM_INVALID, 0)


@pytest.mark.shows("engine.register_mem")
def test_the_largest_memory_shuts_no_peer_out(path: str) -> None:
    """What is registered can be told: a peer believes the whole table, or nothing of it."""
    with engines(2, path) as (server, client):
        ours, theirs = client.add(), server.add(seed=1)
        largest = MemDesc(4096, 2**63 - 1)
        assert server.hixl.register_mem(largest, MemType.MEM_HOST)[0] == h.SUCCESS
        client.connect(server.name)
        assert client.read(server.name, ours, theirs) == h.SUCCESS


@pytest.mark.shows("engine.deregister_mem")
def test_handles_that_are_none_are_no_error_but_zero() -> None:
    with engine() as one:
        handle = one.handle_of(one.add())
        for unknown in (handle + 1, -5, 2**70, handle, handle):
            assert one.hixl.deregister_mem(unknown) == h.SUCCESS
        assert one.hixl.deregister_mem(0) == h.PARAM_INVALID


# -- additions, and what goes wrong --


@pytest.mark.shows("engine.additions")
def test_links_and_figures_are_shown(path: str) -> None:
    options = {"llm_datadist.Metrics": "1"}
    with engines(1, path) as (server,):
        client = Engine(path)
        assert client.initialize("127.0.0.1", options) == h.SUCCESS
        try:
            theirs, ours = server.add(seed=1), client.add()
            assert client.hixl.links() == []
            client.connect(server.name)
            assert client.read(server.name, ours, theirs) == h.SUCCESS
            assert client.write(server.name, ours, theirs) == h.SUCCESS
            assert client.paths() == [path]
            assert client.hixl.links()[0].cluster_id == h.cluster_id_of(server.name)
            operations = client.hixl.stats().operations
            moved = {each.operation: each.nbytes for each in operations}
            assert (moved["pull"], moved["push"]) == (4096, 4096)
        finally:
            client.stop()


@pytest.mark.shows("engine.finalize")
def test_finalize_ends_in_time_whatever_is_under_way() -> None:
    with engines(1) as (server,):
        client = Engine("tcp")
        client.start()
        ours, theirs = client.add(), server.add()
        client.connect(server.name)
        reqs = [client.begin(server.name, READ, ours, theirs) for _ in range(100)]
        assert len(set(reqs)) == 100
        with takes_at_most(8):
            client.stop()
        assert client.hixl.get_transfer_status(reqs[0])[0] == h.FAILED


@pytest.mark.shows("engine.transfer_sync")
def test_an_unmapped_range_is_refused_when_it_is_moved(path: str) -> None:
    with engines(2, path) as (server, client):
        ours = client.add()
        addr = 0x10000  # where nothing is, on Linux
        ret, handle = server.hixl.register_mem(MemDesc(addr, 4096), MemType.MEM_HOST)
        assert (ret, handle > 0) == (h.SUCCESS, True)
        client.connect(server.name)
        desc = h.TransferOpDesc(ours.addr, addr, 64)
        assert client.hixl.transfer_sync(server.name, READ, [desc], LONG_MS) == h.PARAM_INVALID
        desc = whole(ours, ours)
        desc.remote_addr = addr
        assert client.hixl.transfer_sync(server.name, WRITE, [desc], LONG_MS) != h.SUCCESS
        assert np.array_equal(client.array_of(ours), np.zeros(4096, np.uint8))
