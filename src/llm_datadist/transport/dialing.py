"""Dialling, in a thread that waits: connections of streams, and of those that only ask."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Any

from llm_datadist.errors import LLMException
from llm_datadist.running import forks
from llm_datadist.running.bell import Latch
from llm_datadist.running.deadline import Deadline
from llm_datadist.running.threads import start_thread
from llm_datadist.system_errors import pass_on_handlers
from llm_datadist.transport.same_host import SameHost

if TYPE_CHECKING:
    from llm_datadist.endpoint import Endpoint
    from llm_datadist.errors import LLMStatusCode
    from llm_datadist.transport.same_host import Address


def connect(
    at: Address,
    deadline: Deadline,
    failure: LLMStatusCode,
    opened: list[socket.socket] | None = None,
) -> socket.socket:
    """A connection, by the deadline; of a name with several addresses, to the first that answers.

    Sockets are noted in `opened` before they are open. Raises LLMException: LLM_TIMEOUT, or
    `failure` when nobody can be reached there.
    """
    what = f"connecting to {at}"
    deadline.require(what)
    try:
        if isinstance(at, SameHost):
            return at.connect(deadline, opened)
        infos = _look_up(at, deadline)
        for index, info in enumerate(infos[:-1]):
            fair_s = deadline.require(what) / (len(infos) - index)
            try:
                return _connect(*info, fair_s, deadline, opened)
            except OSError as error:  # the next may be on a network that is there
                pass_on_handlers(error)
        return _connect(*infos[-1], deadline.require(what), deadline, opened)
    except BlockingIOError as error:
        pass_on_handlers(error)
        raise deadline.expired(what) from None
    except OSError as error:
        pass_on_handlers(error)
        raise LLMException(f"cannot connect to {at}: {error.strerror}", failure) from error


def _look_up(at: Endpoint, deadline: Deadline) -> list[tuple[int, tuple[Any, ...]]]:
    """Families and addresses. Raises OSError, LLMException(LLM_TIMEOUT).

    A name server that is silent keeps a thread for as long as the system waits for it, which may be
    half a minute.
    """
    if at.is_literal:  # not `getaddrinfo`, in which a handler's ValueError is lost
        return [(socket.AF_INET6 if ":" in at.host else socket.AF_INET, at.sockaddr)]
    said: list[list[Any] | Exception] = []
    is_over = Latch()

    def ask() -> None:
        try:
            said.append(at.look_up())
        except Exception as error:  # raised below
            said.append(error)
        finally:
            is_over.set()

    start_thread(ask, "llm-datadist-name")
    is_over.wait(max(0.0, deadline.remaining_s()))
    if not said:
        raise deadline.expired(f"looking up {at.host}")
    if isinstance(said[0], Exception):
        raise said[0]
    return [(info[0], info[4]) for info in said[0]]


def _connect(
    family: int,
    sockaddr: tuple[Any, ...],
    timeout_s: float,
    deadline: Deadline,
    opened: list[socket.socket] | None,
) -> socket.socket:
    """Raises OSError: BlockingIOError when it takes too long; LLMException when it was cut."""
    sock, limit = forks.open_socket(family, opened), Deadline.after(timeout_s)
    try:
        if deadline.token is not None:
            deadline.token.require()
        sock.settimeout(timeout_s)
        sock.connect(sockaddr)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except TimeoutError as error:
        sock.close()
        if error.errno is None and limit.remaining_s() > 0:
            raise  # a signal's handler did
        raise BlockingIOError(errno.EAGAIN, "no answer in time") from None
    except BaseException:
        sock.close()
        raise
    return sock
