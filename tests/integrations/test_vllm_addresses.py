"""Where a producer of the vLLM connector listens, and what its readers are told to dial."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")

from kv_engine import Engine
from kv_processes import OURS, PROMPT, EngineProcess, Processes, hand_over, opened, two_processes

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from two_hosts import (
    CABLE,
    CLONE_NEWNET,
    HOSTS,
    HOSTS_6,
    enter_host,
    ip,
    lay_cable,
    leave_host,
    unshare,
)

from llm_datadist.testing.cluster import free_port
from llm_datadist.testing.timing import takes_at_most

if TYPE_CHECKING:
    from collections.abc import Iterator

PORT = 14579
#: an interface leads there, and nobody is there
NOBODY = "fd00::77"
SHORT = {"kv_lease_duration": 5.0, "pull_timeout_s": 3.0, "link_timeout_s": 3.0}


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with two_processes() as both:
        yield both


@pytest.fixture
def hosts(processes: Processes) -> Processes:
    """Each on a new host of its own, joined by a cable."""
    both: list[Any] = list(processes)
    try:
        for process in both:
            process.call(leave_host)
        lay_cable(both)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"hosts of our own need root, nsenter, iproute2 and veth: {error}")
    return processes


@pytest.fixture
def neighbours(processes: Processes) -> Processes:
    """Both on one new host, which nothing leads to."""
    one, other = processes
    try:
        one.call(move_to, None)
        other.call(move_to, one.pid)
        loopback: Any = one
        loopback.call(ip, "link", "set", "lo", "up")
    except OSError as error:
        pytest.skip(f"hosts of our own need root: {error}")
    return processes


def move_to(_: Engine, pid: int | None) -> None:
    """Takes this process to a new host, or to that of another process."""
    unshare(CLONE_NEWNET) if pid is None else enter_host(pid)


def read(prefill: EngineProcess, decode: EngineProcess) -> tuple[str, str]:
    """What was advertised, and what came of it."""
    params = hand_over(prefill)
    prefill.call(Engine.step)
    return params["remote_host"], decode.call(Engine.read, "d", PROMPT, params, OURS)


def set_variable(_: Engine, name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def advertised(engine: Engine) -> str | None:
    return engine.worker.advertised_host


@pytest.mark.parametrize(
    ("host", "told"),
    [
        (HOSTS[0], HOSTS[0]),
        ("0.0.0.0", HOSTS[0]),
        (HOSTS_6[0], HOSTS_6[0]),
        (f"[{HOSTS_6[0]}]", HOSTS_6[0]),
        ("FD00:0:0::1", HOSTS_6[0]),
        ("::", HOSTS_6[0]),
        ("[::]", HOSTS_6[0]),
    ],
)
def test_whatever_it_listens_on_it_advertises_what_can_be_dialled(
    hosts: Processes, host: str, told: str
) -> None:
    with (
        opened(hosts[0], "prefill", "kv_producer", PORT, host=host) as prefill,
        opened(hosts[1], "decode", "kv_consumer", **SHORT) as decode,
    ):
        assert read(prefill, decode) == (told, "right")


@pytest.mark.parametrize("address", [HOSTS[0], HOSTS_6[0], f"[{HOSTS_6[0]}]"])
def test_where_it_listens_and_what_it_advertises_are_two_settings(
    hosts: Processes, address: str
) -> None:
    both = {"host": "::", "advertised_host": address}
    with (
        opened(hosts[0], "prefill", "kv_producer", PORT, **both) as prefill,
        opened(hosts[1], "decode", "kv_consumer", **SHORT) as decode,
    ):
        assert read(prefill, decode) == (address.strip("[]"), "right")


def test_a_name_is_advertised_as_it_is(neighbours: Processes) -> None:
    with (
        opened(neighbours[0], "prefill", "kv_producer", PORT, host="localhost") as prefill,
        opened(neighbours[1], "decode", "kv_consumer", **SHORT) as decode,
    ):
        assert read(prefill, decode) == ("localhost", "right")


def test_of_several_addresses_the_one_that_leads_out_is_advertised(hosts: Processes) -> None:
    process: Any = hosts[0]
    process.call(ip, "address", "add", "198.18.9.1/24", "dev", CABLE)
    process.call(ip, "route", "add", "default", "via", "198.18.9.2", "dev", CABLE)
    with opened(hosts[0], "prefill", "kv_producer", PORT, host="0.0.0.0") as prefill:
        assert prefill.call(advertised) == "198.18.9.1"


def test_what_vllm_was_told_of_its_host_is_advertised(hosts: Processes) -> None:
    process: Any = hosts[0]
    process.call(ip, "address", "add", "198.18.9.1/24", "dev", CABLE)
    hosts[0].call(set_variable, "VLLM_HOST_IP", "198.18.9.1")
    try:
        with opened(hosts[0], "prefill", "kv_producer", PORT, host="0.0.0.0") as prefill:
            assert prefill.call(advertised) == "198.18.9.1"
    finally:
        hosts[0].call(set_variable, "VLLM_HOST_IP", None)


def test_workers_of_one_engine_may_be_on_several_nodes(hosts: Processes) -> None:
    """This process has worker 1; that of worker 0 would be on the other host."""
    workers = {"rank": 1, "num_workers": 2, "host": "0.0.0.0"}
    with (
        opened(hosts[0], "prefill", "kv_producer", PORT, **workers) as prefill,
        opened(hosts[1], "decode", "kv_consumer", rank=1, num_workers=2, **SHORT) as decode,
    ):
        prefill.call(Engine.told_of_workers, {0: HOSTS[1]})
        assert read(prefill, decode) == (HOSTS[1], "right")


def test_each_worker_may_be_told_its_host(hosts: Processes) -> None:
    workers = {"rank": 1, "num_workers": 2, "host": [HOSTS[1], HOSTS[0]]}
    with (
        opened(hosts[0], "prefill", "kv_producer", PORT, **workers) as prefill,
        opened(hosts[1], "decode", "kv_consumer", rank=1, num_workers=2, **SHORT) as decode,
    ):
        assert read(prefill, decode) == (HOSTS[1], "right")


def test_a_hand_over_without_our_worker_is_a_failed_load(hosts: Processes) -> None:
    workers = {"rank": 1, "num_workers": 2, "host": "0.0.0.0"}
    with (
        opened(hosts[0], "prefill", "kv_producer", PORT, **workers) as prefill,
        opened(hosts[1], "decode", "kv_consumer", rank=1, num_workers=2, **SHORT) as decode,
    ):
        params = hand_over(prefill)
        prefill.call(Engine.step)
        short = {**params, "remote_hosts": [HOSTS[0]]}
        assert decode.call(Engine.read, "forged", PROMPT, short, OURS) == "failed"
        assert decode.call(Engine.read, "d", PROMPT, params, OURS) == "right"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"advertised_host": "0.0.0.0"}, "advertised_host is 0.0.0.0, which nobody can dial"),
        ({"advertised_host": "[::]"}, "advertised_host is ::, which nobody can dial"),
        ({"host": ""}, "host: '' is no IP address and no host name"),
        ({"host": "10.0.0.1:14579"}, "host: '10.0.0.1:14579' is no IP address and no host name"),
        ({"host": "[localhost]"}, r"host has a name in brackets: '\[localhost\]'"),
        ({"host": "no-such-host.invalid"}, "host: 'no-such-host.invalid' cannot be resolved"),
        ({"host": ["127.0.0.1"], "rank": 1}, "host lists 1 workers, and there is a worker 1"),
    ],
)
def test_what_is_no_host_is_refused_at_the_start(
    processes: Processes, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=f"kv_connector_extra_config: {said}"):
        processes[0].call(Engine.open, "prefill", "kv_producer", free_port(), **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"advertised_host": "198.51.100.1"}, "Network is unreachable"),
        ({"host": "::", "advertised_host": NOBODY}, "timed out after 1.000 s"),
        ({"advertised_host": HOSTS_6[0]}, "Connection refused"),
    ],
)
def test_what_cannot_be_dialled_back_is_refused_at_the_start(
    hosts: Processes, settings: dict[str, Any], said: str
) -> None:
    """In time, and the port is free again."""
    bounded = {"host": "0.0.0.0", "link_timeout_s": 1.0, **settings}
    with takes_at_most(5), pytest.raises(ConnectionError, match=said) as caught:
        hosts[0].call(Engine.open, "prefill", "kv_producer", PORT, **bounded)
    assert "Set advertised_host (kv_connector_extra_config) to an address" in str(caught.value)
    with opened(hosts[0], "prefill", "kv_producer", PORT, host="0.0.0.0") as prefill:
        assert prefill.call(advertised) == HOSTS[0]


def test_what_leads_to_another_engine_is_refused_at_the_start(neighbours: Processes) -> None:
    elsewhere = {"advertised_host": "127.0.0.2"}
    with (
        opened(neighbours[0], "other", "kv_producer", PORT, host="127.0.0.2"),
        pytest.raises(ConnectionError, match="another cluster answers there"),
    ):
        neighbours[1].call(Engine.open, "prefill", "kv_producer", PORT, **elsewhere)


def test_without_a_network_it_can_be_read_from_on_its_host(neighbours: Processes) -> None:
    with (
        opened(neighbours[0], "prefill", "kv_producer", PORT, host="0.0.0.0") as prefill,
        opened(neighbours[1], "decode", "kv_consumer", **SHORT) as decode,
    ):
        assert read(prefill, decode) == ("127.0.0.1", "right")
