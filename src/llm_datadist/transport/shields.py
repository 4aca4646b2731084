"""The shields of a cluster: one for each connection, of what `link_security` says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.link_security import read_secret
from llm_datadist.observe.log import get_logger
from llm_datadist.transport import ktls, records
from llm_datadist.transport.credentials import load_tls
from llm_datadist.transport.renewed import Renewed
from llm_datadist.transport.secret import Secret
from llm_datadist.transport.shield import Open
from llm_datadist.transport.tls import Tls

if TYPE_CHECKING:
    from llm_datadist.link_security import LinkSecurity
    from llm_datadist.transport.credentials import TlsContexts
    from llm_datadist.transport.shield import Shield


class Shields:
    """Makes the shield of each connection of a cluster, of files as they are then. Thread-safe."""

    def __init__(self, security: LinkSecurity | None) -> None:
        """Raises LLMException(LLM_PARAM_INVALID) for files that no link can be made with."""
        self._secret: Renewed[bytes] | None = None
        self._contexts: Renewed[TlsContexts] | None = None
        if security is None:
            return
        if (secret := security.secret) is None:
            _say_what_is_missing()
            files = (security.ca, security.certificate, security.key)
            self._contexts = Renewed(files, lambda: load_tls(security))
        elif file := security.secret_file:
            self._secret = Renewed((file,), lambda: read_secret(file))
        else:
            self._secret = Renewed((), lambda: secret)

    @property
    def is_secure(self) -> bool:
        return self._secret is not None or self._contexts is not None

    def make(self, *, is_caller: bool, over_tcp: bool = False) -> Shield:
        """A caller says what the connection goes over: only TCP's may be the kernel's to seal."""
        if self._secret is not None:
            return Secret(self._secret.get(), is_caller=is_caller)
        if self._contexts is not None:
            contexts = self._contexts.get()
            callers = contexts.tcp_caller if over_tcp else contexts.caller
            return Tls(callers if is_caller else contexts.listener, is_caller=is_caller)
        return Open()


def _say_what_is_missing() -> None:
    """For faster TLS."""
    if reason := ktls.why_not():
        get_logger().info("link_security: TLS without the kernel: %s", reason)
    if reason := records.why_not():
        get_logger().info("link_security: slow TLS, for want of the extra tls: %s", reason)
