"""What a cluster says of its links, and where it listens. Spec 5."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from llm_datadist.errors import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from llm_datadist.endpoint import Endpoint
    from llm_datadist.engine.engine import Engine


class LinkInfo(NamedTuple):
    """A live link, as users see it. An addition to the reference."""

    cluster_id: int
    path: str  #: how its bytes travel: "cma" (same host) or "tcp"
    path_reason: str  #: why no better path is used; empty when there is none
    endpoint: Endpoint | None  #: where we called the peer; None when it called us


def live_links(engine: Engine) -> list[LinkInfo]:
    """The live links, each with the path of its bytes."""
    return [
        LinkInfo(session.cluster_id, session.path, session.path_reason, session.endpoint)
        for session in engine.links.all()
    ]


def move_listener(engine: Engine, listen: Endpoint | None) -> None:
    """Listens there, or no more, as a change of the role asks for. Spec 5.7.

    Raises LLMException: LLM_EXIST_LINK, LLM_FAILED when the address cannot be had, and
    LLM_FEATURE_NOT_ENABLED for another address where a transfer backend is configured.
    """
    if engine.options.transfer_backend is None:
        engine.listen_on(listen)
    elif listen not in (None, engine.options.listen):
        raise LLMException(
            f"with a transfer backend the address stays {engine.options.listen}",
            LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
        )
