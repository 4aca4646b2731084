"""etcd as one word: `etcds://host:port/prefix?ca=/path&user=me&password_file=/path`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, urlsplit

from llm_datadist.credential_file import read_credential
from llm_datadist.directory.etcd import EtcdDirectory
from llm_datadist.errors import invalid

if TYPE_CHECKING:
    import ssl

_FILES: Final = ("ca", "certificate", "key")
_NAMES: Final = (*_FILES, "user", "password_file")


def etcd_of(word: str) -> EtcdDirectory:
    """The directory that it names: by TLS if it begins with `etcds:`.

    The word has files, and no secret itself: it stands in logs and lists of processes. Raises
    LLMException (LLM_PARAM_INVALID), ValueError as EtcdDirectory.
    """
    parts = urlsplit(word)
    said = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := sorted(set(said) - set(_NAMES)):
        raise invalid(f"{word!r} has {', '.join(unknown)}: etcd takes {', '.join(_NAMES)}")
    is_secure = parts.scheme == "etcds"
    if not is_secure and any(name in said for name in _FILES):
        raise invalid(f"{word!r} names files of TLS, which etcds://… has")
    if ("user" in said) != ("password_file" in said):
        raise invalid(f"{word!r} needs both user and password_file, or neither")
    password = ""
    if "user" in said:
        password = read_credential("password_file", said["password_file"]).decode().strip()
    return EtcdDirectory(
        f"{'https' if is_secure else 'http'}://{parts.netloc}",
        parts.path or "/llm-datadist",
        tls=_tls(*(said.get(name) for name in _FILES)) if is_secure else None,
        user=said.get("user", ""),
        password=password,
    )


def _tls(ca: str | None, certificate: str | None, key: str | None) -> ssl.SSLContext:
    import ssl  # slow to import

    for name, file in zip(_FILES, (ca, certificate, key), strict=True):
        if file is not None:
            read_credential(name, file)
    try:
        context = ssl.create_default_context(cafile=ca)
        if certificate is not None:
            context.load_cert_chain(certificate, key, password="")
    except OSError as error:  # ssl.SSLError is one
        raise invalid(f"TLS for etcd cannot be had of these files: {error}") from error
    return context
