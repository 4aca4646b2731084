"""Dialling, in a thread that waits: connections of streams, and of those that only ask."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from llm_datadist.errors import LLMException
from llm_datadist.running import forks
from llm_datadist.running.deadline import Deadline
from llm_datadist.transport.same_host import SameHost

if TYPE_CHECKING:
    from llm_datadist.errors import LLMStatusCode
    from llm_datadist.transport.same_host import Address


def connect(at: Address, deadline: Deadline, failure: LLMStatusCode) -> socket.socket:
    """A connection, by the deadline; of a name with several addresses, to the first that answers.

    Raises LLMException: LLM_TIMEOUT, or `failure` when nobody can be reached there.
    """
    what = f"connecting to {at}"
    deadline.require(what)
    try:
        if isinstance(at, SameHost):
            return at.connect(deadline)
        infos = socket.getaddrinfo(*at, type=socket.SOCK_STREAM)
        for index, info in enumerate(infos[:-1]):
            fair_s = deadline.require(what) / (len(infos) - index)
            with suppress(ConnectionError, BlockingIOError):
                return _connect(info[0], info[4], fair_s)
        return _connect(infos[-1][0], infos[-1][4], deadline.require(what))
    except BlockingIOError:
        raise deadline.expired(what) from None
    except OSError as error:
        if error.errno is None:  # a signal's handler raised it
            raise
        raise LLMException(f"cannot connect to {at}: {error.strerror}", failure) from error


def _connect(family: int, sockaddr: tuple[Any, ...], timeout_s: float) -> socket.socket:
    """Raises OSError: BlockingIOError when it takes too long."""
    sock, limit = forks.open_socket(family), Deadline.after(timeout_s)
    try:
        sock.settimeout(timeout_s)
        sock.connect(sockaddr)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except TimeoutError as error:
        sock.close()
        if error.errno is None and limit.remaining_s() > 0:
            raise  # a signal's handler did
        raise BlockingIOError from None
    except BaseException:
        sock.close()
        raise
    return sock
