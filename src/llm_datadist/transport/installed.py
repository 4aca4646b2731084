"""The transports that an engine has: ours, and what other packages add by an entry point.

    [project.entry-points."llm_datadist.transports"]
    mine = "my_package:MyTransport"

The object is called with the engine's Movers and returns a Transport of that name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.observe.log import get_logger
from llm_datadist.options import TRANSPORT_GROUP
from llm_datadist.transport.cma import CmaTransport
from llm_datadist.transport.tcp import TcpTransport

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from llm_datadist.options import Options
    from llm_datadist.transport.base import Transport
    from llm_datadist.transport.movers import Movers


def transports_for(options: Options, movers: Movers) -> dict[str, Transport]:
    """The transports to offer to peers, by name. Raises LLMException.

    NIXL takes threads and time to start: it is there where it is asked for, or where it has a
    network that TCP cannot use, and nobody asks for TLS, which it does not know.
    """
    transports: list[Transport] = [CmaTransport(movers), TcpTransport(movers)]
    if options.path == "nixl" or (options.path == "auto" and _nixl_is_better(options)):
        from llm_datadist.transport.nixl import NixlTransport  # imports what may not be installed

        if _wants_tls(options):
            get_logger().warning(
                "the path nixl was asked for by name: what it moves is not encrypted, whatever "
                "link_security says"
            )
        transports.append(NixlTransport(movers))
    transports += [_load(point, movers) for point in _others(options.path)]
    return {transport.name: transport for transport in transports}


def _nixl_is_better(options: Options) -> bool:
    from llm_datadist.transport.nixl import is_worthwhile

    return not _wants_tls(options) and is_worthwhile()


def _wants_tls(options: Options) -> bool:
    security = options.link_security
    return security is not None and security.secret is None


def _others(path: str) -> list[EntryPoint]:
    """Those that may be used: all, or the one that is asked for."""
    if path in ("cma", "tcp", "nixl"):
        return []
    from importlib.metadata import entry_points  # slow to import

    points = entry_points(group=TRANSPORT_GROUP)
    return [point for point in points if path in ("auto", point.name)]


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
    return transport
