"""What the option `link_security` says: by what clusters that link know each other."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Final, final

from llm_datadist.checks import describe
from llm_datadist.credential_file import read_credential
from llm_datadist.errors import invalid

_MIN_SECRET_NBYTES: Final = 16
_TLS_FIELDS: Final = ("ca", "certificate", "key")
_FORMS: Final = (
    '{"secret": "..."}, {"secret_file": "/path"} or '
    '{"ca": "/path", "certificate": "/path", "key": "/path"}'
)


@final
@dataclass(frozen=True, slots=True)
class LinkSecurity:
    """Either a secret that all clusters share, or files in PEM format for mutual TLS.

    The secret does not show in the repr.
    """

    #: as it was when the option was read; None for TLS
    secret: bytes | None = field(default=None, repr=False)
    #: where it is read again when it was renewed; empty for a secret that the option itself has
    secret_file: str = ""
    ca: str = ""
    certificate: str = ""
    key: str = ""

    @classmethod
    def parse(cls, text: str, name: str = "link_security") -> LinkSecurity:
        """What the JSON object `text` says; `name` is what messages call it.

        Raises LLMException (LLM_PARAM_INVALID), which never quotes the text: it may be a secret.
        """
        try:
            fields = json.loads(text, object_pairs_hook=_each_once)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise invalid(f"{name} must be a JSON object, with each field once: {_FORMS}")
        for key, value in fields.items():
            if not isinstance(value, str) or not value:
                raise invalid(f"{name}: {describe(key)} must be a text")
        given = {key: value for key, value in fields.items() if isinstance(value, str)}
        if set(given) == {"secret"}:
            return cls(secret=_long_enough(name, _bytes_of(name, given["secret"])))
        if set(given) == {"secret_file"}:
            file = given["secret_file"]
            return cls(secret=read_secret(file, name), secret_file=file)
        if set(given) == set(_TLS_FIELDS):
            for file in given.values():
                read_credential(name, file)
            return cls(None, "", *(given[each] for each in _TLS_FIELDS))
        raise invalid(f"{name} has the fields {sorted(given)}; it must be {_FORMS}")


def read_secret(file: str, name: str = "link_security") -> bytes:
    """The secret in a file. Raises LLMException (LLM_PARAM_INVALID)."""
    return _long_enough(name, read_credential(name, file).strip(), f" in {file}")


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Raises ValueError for a field that is there twice: nobody knows which one is meant."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError
    return fields


def _bytes_of(name: str, secret: str) -> bytes:
    try:
        return secret.encode()
    except UnicodeEncodeError:  # which has the secret in its text
        raise invalid(f"{name}: the secret has a character that is none (half a pair)") from None


def _long_enough(name: str, secret: bytes, place: str = "") -> bytes:
    if len(secret.strip()) < _MIN_SECRET_NBYTES:
        raise invalid(
            f"{name}{place}: a secret has at least {_MIN_SECRET_NBYTES} bytes; take random ones"
        )
    return secret
