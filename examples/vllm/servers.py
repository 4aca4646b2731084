"""Starts and stops vLLM servers, and the proxy before them. Every wait has a deadline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import httpx

from llm_datadist.cli.failure import CommandError
from llm_datadist.testing.cluster import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from connector import Connector

MODEL_NAME = "model"
MAX_MODEL_TOKENS = 2048
#: a server takes 40 s to start on two idle cores, and minutes when they are busy
_START_S = 600.0
#: how long one may take to end by itself
_ENDING_S = 20.0
_POLL_S = 0.2
#: a thread that takes so many of the 100 ticks of a second, at each of several looks, polls
_LOOKS, _LOOK_S, _BUSY_TICKS = 3, 1.0, 20
#: each has the port behind that of the one before
_MOST_RANKS = 2
_HERE = Path(__file__).parent

_ENVIRONMENT = {
    # Two servers share these cores. Threads that are bound to cores wait for each other by
    # spinning, which makes both slower by an order of magnitude; one thread each does not.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # The model is a local directory, and nobody needs to hear of it.
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What all servers of a run have in common."""

    model: Path
    logs: Path
    dtype: str = "float32"


@dataclass(slots=True)
class Process:
    """A program that answers on an HTTP port. It can be started again at the same one."""

    name: str
    command: list[str]
    log: Path
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    #: what answers as soon as it does
    health: str = "/health"
    _process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        """Without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def completions_url(self) -> str:
        """Where it takes prompts."""
        return f"{self.base_url}/v1/completions"

    def start(self) -> None:
        """Start it, in a process group of its own, which is how all of it can be ended."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Return when it answers. Raises CommandError when it has ended, or takes too long."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise CommandError(f"{self.name} has ended while it started: see {self.log}")
            with suppress(httpx.TransportError):
                if httpx.get(self.base_url + self.health, timeout=5.0).is_success:
                    return
            time.sleep(_POLL_S)
        raise CommandError(f"{self.name} is not ready after {_START_S:.0f} s: see {self.log}")

    def pause(self) -> None:
        """Let it and its children stand still."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, number)

    def put_pollers_behind(self) -> int:
        """Threads that keep a core busy now, when nothing is to do, get what others leave.

        How many they are.
        """
        busy = set(self._ticks_by_thread())
        for _ in range(_LOOKS):  # what an engine still computes ends
            before = self._ticks_by_thread()
            time.sleep(_LOOK_S)
            busy &= {
                thread
                for thread, ticks in self._ticks_by_thread().items()
                if ticks - before.get(thread, ticks) > _BUSY_TICKS
            }
        for thread in busy:
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
        return len(busy)

    def _ticks_by_thread(self) -> dict[int, int]:
        """The processor time of each thread, also of its children."""
        ticks = {}
        for stat in Path("/proc").glob("[0-9]*/task/[0-9]*/stat"):
            with suppress(OSError):  # it has ended
                fields = stat.read_text().rpartition(")")[2].split()
                if self._process is not None and int(fields[2]) == self._process.pid:
                    ticks[int(stat.parent.name)] = int(fields[11]) + int(fields[12])
        return ticks

    def kill(self) -> None:
        """End it and its children at once, as a crash would."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(_ENDING_S)
            self._process = None

    def stop(self) -> None:
        """End it, in peace if it can."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_ENDING_S)
            self.kill()


@dataclass(frozen=True, slots=True)
class Pair:
    """Prefill, decode and the proxy."""

    prefill: Process
    decode: Process
    proxy: Process


@dataclass(frozen=True, slots=True)
class Group:
    """Prefills and decodes, and the router in front of them."""

    prefills: list[Process]
    decodes: list[Process]
    front: Process


@contextmanager
def plain_server(settings: Settings) -> Iterator[Process]:
    """One server that does everything itself."""
    server = _server(settings, "plain")
    with _running(server):
        yield server


@contextmanager
def server_pair(
    settings: Settings,
    connector: Connector,
    policy: str,
    prefill_options: Sequence[str] = (),
    decode_options: Sequence[str] = (),
    extra: Mapping[str, object] = MappingProxyType({}),
    proxy_options: Sequence[str] = (),
    *,
    are_both: bool = False,
    toy_proxy: Path | None = None,
) -> Iterator[Pair]:
    """Prefill and decode by `connector`, and the proxy before them.

    `prefill_options` and `decode_options` are vLLM's, `extra` is for the connector. `are_both`:
    each may read from the other. `toy_proxy`: vLLM's program, in place of ours.
    """
    prefill, decode = (
        _server(
            settings,
            f"{connector.value}-{name}",
            connector.transfer_config(
                "kv_both" if are_both else f"kv_{role}", policy, kv_port, extra
            ),
            connector.environment(kv_port),
            options,
        )
        for name, role, kv_port, options in (
            ("prefill", "producer", free_port(_MOST_RANKS), prefill_options),
            ("decode", "consumer", free_port(_MOST_RANKS), decode_options),
        )
    )
    command = [sys.executable, str(toy_proxy or _HERE / "proxy.py")]
    command += ["--port", str(port := free_port()), *proxy_options]
    proxy = Process("proxy", command, settings.logs / "proxy.log", port)
    if toy_proxy is None:
        command += ["--prefill", prefill.completions_url, "--decode", decode.completions_url]
    else:
        proxy.health = "/healthcheck"
        for name, server in (("prefiller", prefill), ("decoder", decode)):
            command += [f"--{name}-host", "127.0.0.1", f"--{name}-port", str(server.port)]
    with _running(prefill, decode, proxy):
        yield Pair(prefill, decode, proxy)


@contextmanager
def router_group(
    settings: Settings, connector: Connector, num_prefills: int, num_decodes: int
) -> Iterator[Group]:
    """So many of each kind by `connector`, and `vllm-router` in front of them, by turns."""
    prefills, decodes = _servers(settings, connector, num_prefills, num_decodes)
    command = [sys.executable, "-m", "vllm_router.launch_router", "--vllm-pd-disaggregation"]
    command += ["--policy", "round_robin", "--kv-connector", "nixl", "--host", "127.0.0.1"]
    command += ["--port", str(port := free_port()), "--prometheus-port", str(free_port())]
    for each in prefills:
        command += ["--prefill", each.base_url]
    for each in decodes:
        command += ["--decode", each.base_url]
    front = Process("router", command, settings.logs / "router.log", port)
    with _running(*prefills, *decodes), _running(front):  # it waits for them, and not for long
        yield Group(prefills, decodes, front)


@contextmanager
def fleet_group(
    settings: Settings, connector: Connector, num_prefills: int, num_decodes: int
) -> Iterator[Group]:
    """The same, announced in a directory, which the proxy of a fleet in front of them reads."""
    folder = settings.logs / "fleet"
    folder.mkdir(exist_ok=True)
    directory = f"folder:{folder}"
    prefills, decodes = _servers(settings, connector, num_prefills, num_decodes, directory)
    command = [sys.executable, str(_HERE / "fleet_proxy.py"), "--directory", directory]
    command += ["--port", str(port := free_port())]
    front = Process("fleet-proxy", command, settings.logs / "fleet-proxy.log", port)
    with _running(*prefills, *decodes, front):
        yield Group(prefills, decodes, front)


def _servers(
    settings: Settings,
    connector: Connector,
    num_prefills: int,
    num_decodes: int,
    directory: str | None = None,
) -> tuple[list[Process], list[Process]]:
    """Prefills and decodes."""

    def one(kind: str, role: str, number: int) -> Process:
        port, kv_port, extra = free_port(), free_port(), dict[str, object]()
        if directory is not None:
            labels = {"http": f"http://127.0.0.1:{port}"}
            extra = {"directory": directory, "labels": labels}
        transfer = connector.transfer_config(role, "fail", kv_port, extra)
        environment = connector.environment(kv_port)
        return _server(
            settings, f"{connector.value}-{kind}-{number}", transfer, environment, port=port
        )

    return (
        [one("prefill", "kv_producer", number) for number in range(num_prefills)],
        [one("decode", "kv_consumer", number) for number in range(num_decodes)],
    )


@contextmanager
def _running(*processes: Process) -> Iterator[None]:
    with ExitStack() as stack:
        for process in processes:
            stack.callback(process.stop)
            process.start()
        for process in processes:
            process.wait_until_ready()
        yield


def _server(
    settings: Settings,
    name: str,
    transfer_config: dict[str, object] | None = None,
    environment: dict[str, str] | None = None,
    options: Sequence[str] = (),
    port: int | None = None,
) -> Process:
    port = port or free_port()
    # Not the script `vllm`: it looks for a distribution of that name, and this one is vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(settings.model), "--served-model-name", MODEL_NAME]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", settings.dtype]
    command += ["--max-model-len", str(MAX_MODEL_TOKENS), "--enforce-eager", *options]
    if transfer_config is not None:
        command += ["--kv-transfer-config", json.dumps(transfer_config)]
    return Process(
        name, command, settings.logs / f"{name}.log", port, _ENVIRONMENT | (environment or {})
    )
