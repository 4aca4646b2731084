"""Names of engines, and the cluster ids that stand for them.

The id of an engine is made of its name: whoever knows the name finds its links, and nobody can take
it while its owner lives (links/ids.py). Names that stand for every address of a host name none.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import secrets
from typing import Final, NamedTuple

from llm_datadist.checks import UINT16_MAX
from llm_datadist.endpoint import Endpoint, is_ip_literal
from llm_datadist.errors import invalid

_HOST_AND_PORT: Final = re.compile(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::(-?[0-9]{1,10}))?")
_ID_NBYTES: Final = 8


class EngineName(NamedTuple):
    """`ip:port`, `ip`, `[ipv6]:port` or `[ipv6]`; without a port nobody can call the engine."""

    host: str
    port: int | None

    @classmethod
    def parse(cls, text: str, name: str) -> EngineName:
        """A port of 0 or less is none. Raises LLMException(LLM_PARAM_INVALID)."""
        found = _HOST_AND_PORT.fullmatch(text)
        host = (found[1] or found[2]) if found else ""
        if found is None or not is_ip_literal(host) or bool(found[1]) != (":" in host):
            raise invalid(
                f'{name} must be "ip:port", "ip", "[ipv6]:port" or "[ipv6]", got {text!r}'
            )
        port = int(found[3] or 0)
        if port > UINT16_MAX:
            raise invalid(f"{name} has a port above {UINT16_MAX}: {text!r}")
        return cls(str(ipaddress.ip_address(host)), port if port > 0 else None)

    def __str__(self) -> str:
        if self.port is None:
            return f"[{self.host}]" if ":" in self.host else self.host
        return str(self.endpoint)

    @property
    def endpoint(self) -> Endpoint:
        """Where the engine listens. Raises LLMException(LLM_PARAM_INVALID) where it does not."""
        if self.port is None:
            raise invalid(f"{self} has no port: an engine without one connects, and is not called")
        return Endpoint(self.host, self.port)

    @property
    def cluster_id(self) -> int:
        """The same in every process."""
        digest = hashlib.sha256(f"hixl engine {self}".encode()).digest()
        return int.from_bytes(digest[:_ID_NBYTES], "big")

    def new_id(self) -> int:
        """The id of an engine that has this name."""
        if ipaddress.ip_address(self.host).is_unspecified:
            return secrets.randbits(8 * _ID_NBYTES)
        return self.cluster_id


def cluster_id_of(engine: str) -> int:
    """The cluster id that an engine of this name has: for logs, and for certificates.

    An addition to the reference. Raises LLMException(LLM_PARAM_INVALID) for what is no name.
    """
    return EngineName.parse(engine, "engine").cluster_id
