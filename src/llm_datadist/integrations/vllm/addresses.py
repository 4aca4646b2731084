"""Where a worker listens, and where its readers are told to dial it.

The two differ: who listens on all addresses is dialled at one of them, and who is behind a name or
another network's address is dialled there. What is advertised is in every hand-over, and part of
what a producer is known by, so it is settled, and tried, before there is any.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import threading
from concurrent import futures
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from llm_datadist.endpoint import Endpoint, host_of, is_ip_literal, parse_ip
from llm_datadist.errors import LLMException
from llm_datadist.integrations.vllm.interfaces import address_of_route, addresses_of_interfaces
from llm_datadist.peer.asking import ask_stats

if TYPE_CHECKING:
    from llm_datadist.integrations.vllm.settings import Settings
    from llm_datadist.link_security import LinkSecurity

logger = logging.getLogger(__name__)

#: where vLLM itself is told which address of a machine is meant
_VLLM_VARIABLE = "VLLM_HOST_IP"
#: for who answers, but slowly
_GRACE_S = 1.0


class Place(NamedTuple):
    """Of one worker."""

    #: an IP address, and the worker's port
    listen: Endpoint
    advertised: Endpoint

    def check_dialled(
        self, cluster_id: int, security: LinkSecurity | None, timeout_s: float
    ) -> None:
        """Dials what is advertised. Raises ConnectionError if it is not this cluster that answers.

        A name server, which has no time-out of ours, is not waited for either.
        """
        answer: futures.Future[int] = futures.Future()

        def ask() -> None:
            try:
                answer.set_result(ask_stats(self.advertised, security, timeout_s).cluster_id)
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=ask, name="kv-dial", daemon=True).start()
        try:
            there = answer.result(timeout_s + _GRACE_S)
            if there == cluster_id:
                return
            why = f"another cluster answers there ({there})"
        except futures.TimeoutError:
            why = f"no answer within {timeout_s:g} s"
        except LLMException as error:
            why = str(error)
        raise ConnectionError(
            f"readers would be told to dial {self.advertised}, and this worker, which listens on "
            f"{self.listen}, cannot be reached there: {why}. Set advertised_host "
            "(kv_connector_extra_config) to an address or name of this machine that they reach"
        )


def place_of(settings: Settings, rank: int) -> Place:
    """Where worker `rank` of a producer is.

    Raises ValueError, which names the setting, for what is no host, or cannot be dialled or
    listened on.
    """
    host, advertised = _host(settings, rank), advertised_host(settings, rank)
    port = settings.port + rank
    return Place(Endpoint(_listened_on(host), port), Endpoint(advertised, port))


def advertised_host(settings: Settings, rank: int) -> str:
    """What readers of worker `rank` are told to dial: an IP address or a name. Raises as above."""
    told = settings.extra.advertised_host
    if told is None:
        host = _host(settings, rank)
        return _own_address(host) if _is_any(host) else host
    advertised = _parse(_of_rank(told, rank, "advertised_host"), "advertised_host")
    if _is_any(advertised):
        raise _wrong(f"advertised_host is {advertised}, which nobody can dial")
    return advertised


def _host(settings: Settings, rank: int) -> str:
    return _parse(_of_rank(settings.extra.host, rank, "host"), "host")


def _of_rank(hosts: str | list[str], rank: int, name: str) -> str:
    if isinstance(hosts, str):
        return hosts
    if rank < len(hosts):
        return hosts[rank]
    raise _wrong(f"{name} lists {len(hosts)} workers, and there is a worker {rank}")


def _parse(text: str, name: str) -> str:
    """The one spelling of an address: engines are told apart by it."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if ":" not in bare or not is_ip_literal(bare):
        try:
            host = host_of(parse_ip(bare))
        except RuntimeError as error:
            raise _wrong(f"{name}: {error}") from None
        if bare == text or is_ip_literal(host):
            return host
        raise _wrong(f"{name} has a name in brackets: {text!r}")
    return str(ipaddress.ip_address(bare))


def _is_any(host: str) -> bool:
    return is_ip_literal(host) and ipaddress.ip_address(host).is_unspecified


def _own_address(any_host: str) -> str:
    """The address of this machine that others most likely reach.

    The one that vLLM was told; the one that leads out; the first of an interface.
    """
    if told := os.environ.get(_VLLM_VARIABLE):
        return _parse(told, _VLLM_VARIABLE)
    # who listens on :: listens on IPv4 as well
    families = [socket.AF_INET6, socket.AF_INET] if ":" in any_host else [socket.AF_INET]
    for find in (address_of_route, addresses_of_interfaces):
        for family in families:
            if found := find(family):
                logger.info("host is %s: readers are told to dial %s", any_host, found[0])
                return found[0]
    alone = "::1" if ":" in any_host else "127.0.0.1"
    logger.warning("no interface has an address: only readers of this machine can dial %s", alone)
    return alone


def _listened_on(host: str) -> str:
    """An address of this machine that the host is. Of a name with both, IPv4: all can dial that."""
    if is_ip_literal(host):
        return host
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        raise _wrong(f"host: {host!r} cannot be resolved: {error}") from None
    found = sorted({str(info[4][0]) for info in infos}, key=lambda address: ":" in address)
    for address in found:
        with suppress(OSError), socket.socket(_family(address), socket.SOCK_DGRAM) as trial:
            trial.bind((address, 0))
            if ipaddress.ip_address(address).is_loopback and host != "localhost":
                logger.warning("%s is %s here, which no other machine reaches", host, address)
            return address
    raise _wrong(
        f"host: {host!r} is {', '.join(found)}, which is no address of this machine: set "
        f"advertised_host to {host!r}, and host to where to listen, as 0.0.0.0"
    )


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _wrong(what: str) -> ValueError:
    return ValueError(f"kv_connector_extra_config: {what}")
