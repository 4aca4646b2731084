"""Wants: whom a cluster links to, of those who are announced."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, final

from llm_datadist.checks import check_dict, check_int, check_sequence, check_type
from llm_datadist.types import LLMRole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llm_datadist.directory.record import Record

_MOST_LINKS: Final = 100_000


@final
@dataclass(frozen=True, slots=True)
class Wants:
    """Whom to link to, when, and how many of them at most. Immutable. An addition to the reference.

    Facts must fit anyway: what two members both state, as `facts` of `follow`, must be equal, and
    what this one states the other must state, too. Raises TypeError, ValueError.
    """

    #: of these roles; empty: of any
    roles: Sequence[LLMRole] = ()
    #: with these labels, each as it stands here
    labels: Mapping[str, str] = field(default_factory=dict)
    #: as soon as they are announced; otherwise when a call first names them
    at_once: bool = True
    max_links: int = 256

    def __post_init__(self) -> None:
        check_sequence("roles", self.roles, LLMRole)
        check_dict("labels", self.labels, str, str)
        check_type("at_once", self.at_once, bool)
        check_int("max_links", self.max_links, 1, _MOST_LINKS)

    def objection(self, mine: Mapping[str, str], record: Record) -> str:
        """Why that member is not linked to; empty when it is. `mine` are this cluster's facts."""
        if self.roles and record.role not in {role.name for role in self.roles}:
            return f"its role is {record.role}"
        for name, value in self.labels.items():
            if record.labels.get(name) != value:
                return f"its label {name!r} is {record.labels.get(name)!r}, wanted {value!r}"
        for name, value in mine.items():
            if record.facts.get(name) != value:
                return f"its fact {name!r} is {record.facts.get(name)!r}, ours {value!r}"
        if record.endpoint is None:
            return "it does not listen"
        return ""
