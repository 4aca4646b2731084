"""Asking a running cluster how it is, without linking to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.core import messages as m
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.running.deadline import Deadline
from llm_datadist.transport.dialing import connect
from llm_datadist.transport.sealed import greeted
from llm_datadist.transport.shields import Shields

if TYPE_CHECKING:
    from llm_datadist.core.stats import ClusterStats
    from llm_datadist.endpoint import Endpoint
    from llm_datadist.link_security import LinkSecurity


def ask_stats(endpoint: Endpoint, security: LinkSecurity | None, timeout_s: float) -> ClusterStats:
    """What the cluster that listens at the endpoint says of itself. In any thread.

    `security` must be that of the cluster; `options.read_link_security({})` is what the environment
    says. Without it the cluster keeps addresses and ids of keys to itself. Whoever answers may be
    anybody: an answer is at most m.MAX_STATS_NBYTES long and complete within `timeout_s`, its
    numbers are within the bounds of their fields, its words printable.

    Raises LLMException: LLM_LINK_FAILED when nobody listens there, LLM_TIMEOUT; LLM_NOT_YET_LINK
    when whoever listens hangs up or LLM_FAILED when it answers otherwise, as for another link
    security; LLM_PARAM_INVALID for certificates that cannot be read.
    """
    shield = Shields(security).make(is_caller=True, over_tcp=True)
    deadline = Deadline.after(timeout_s)
    sock = connect(endpoint, deadline, LLMStatusCode.LLM_LINK_FAILED)
    try:
        stream = greeted(sock, shield, deadline)
        answer = stream.ask(m.AskStats(), deadline, m.MAX_STATS_NBYTES)
    except LLMException as error:
        hint = "; the cluster must have the same link security, and a version that can be asked"
        is_clear = error.status_code is LLMStatusCode.LLM_TIMEOUT
        raise LLMException(
            f"{endpoint}: {error}{'' if is_clear else hint}", error.status_code
        ) from error
    finally:
        sock.close()
    if not isinstance(answer, m.Stats):
        raise LLMException(f"{endpoint} answered {answer!r:.200}", LLMStatusCode.LLM_FAILED)
    return answer.stats
