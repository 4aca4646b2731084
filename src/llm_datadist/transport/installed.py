"""The transports that a cluster has: ours, and what other packages add by an entry point.

    [project.entry-points."llm_datadist.transports"]
    mine = "my_package:MyTransport"

The object is called with the cluster's Movers and returns a Transport of that name.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.observe.log import get_logger
from llm_datadist.options import TRANSPORT_GROUP
from llm_datadist.transport.cma import CmaTransport
from llm_datadist.transport.tcp import TcpTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from importlib.metadata import EntryPoint

    from llm_datadist.options import Options
    from llm_datadist.running.movers import Movers
    from llm_datadist.transport.base import Transport

_OURS: Final = ("cma", "tcp", "nixl")


def transports_for(options: Options, movers: Movers) -> dict[str, Transport]:
    """The transports to offer to peers, by name. Raises LLMException.

    NIXL takes threads and time to start: it is there where it is asked for, or where it has a
    network that TCP cannot use. Where TLS is asked for, what does not know it is there by its name
    only.
    """
    transports: list[Transport] = [CmaTransport(movers), TcpTransport(movers)]
    security = options.link_security
    wants_tls = security is not None and security.secret is None
    if options.path == "auto":
        if not wants_tls:
            transports += _those_that_can_be_made(movers)
    elif options.path not in ("cma", "tcp"):
        transports += _by_name(options.path, movers)
        if wants_tls:
            get_logger().warning(
                "the path %s was asked for by name: what it moves is not encrypted, whatever "
                "link_security says", options.path,
            )  # fmt: skip
    return {transport.name: transport for transport in transports}


def _by_name(name: str, movers: Movers) -> list[Transport]:
    if name == "nixl":
        return [_nixl(movers)]
    return [_load(point, movers) for point in _others(name)]


def _those_that_can_be_made(movers: Movers) -> Iterator[Transport]:
    """What may be better than ours; what cannot be made is left out, with a warning."""
    from llm_datadist.transport.nixl import is_worthwhile

    made: list[Callable[[], Transport]] = [partial(_load, each, movers) for each in _others()]
    if is_worthwhile():
        made.append(partial(_nixl, movers))
    for make in made:
        try:
            yield make()
        except LLMException as error:
            get_logger().warning("links do without a transport: %s", error)


def _nixl(movers: Movers) -> Transport:
    from llm_datadist.transport.nixl import NixlTransport  # imports numpy

    return NixlTransport(movers)


def _others(name: str | None = None) -> list[EntryPoint]:
    """Those of other packages: all, or the one of that name."""
    from importlib.metadata import entry_points  # slow to import

    points = entry_points(group=TRANSPORT_GROUP)
    return [point for point in points if name in (None, point.name)]


def _load(point: EntryPoint, movers: Movers) -> Transport:
    try:
        transport: Transport = point.load()(movers)
    except LLMException:
        raise
    except Exception as error:  # whatever a stranger's package raises
        raise LLMException(
            f"the transport {point.name} ({point.value}) cannot be made: {error!r}",
            LLMStatusCode.LLM_FAILED,
        ) from error
    if transport.name != point.name or point.name in _OURS:
        raise LLMException(
            f"the transport {point.name} ({point.value}) calls itself {transport.name}: its name "
            f"must be that of its entry point, and none of {', '.join(_OURS)}",
            LLMStatusCode.LLM_FAILED,
        )
    return transport
