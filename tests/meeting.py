"""Two shields that meet in one thread, without a socket in between."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.transport.shield import NotAuthentic

if TYPE_CHECKING:
    from llm_datadist.transport.shield import Shield


def meet(caller: Shield, listener: Shield) -> tuple[str, str]:
    """What each end says of the other: nothing, once both are done."""
    reasons = {caller: "", listener: ""}
    to, data = listener, caller.start()
    while data:
        try:
            data = to.answer(data)
        except NotAuthentic as error:
            reasons[to], data = str(error), error.parting
        to = caller if to is listener else listener
        if reasons[to]:
            break
    assert any(reasons.values()) or (caller.is_done and listener.is_done)
    return reasons[caller], reasons[listener]
