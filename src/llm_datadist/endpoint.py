"""Network addresses as the interface writes them. Spec 3.11, 5.1."""

from __future__ import annotations

import ipaddress
import re
import socket
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias

from llm_datadist.checks import check_uint16, check_uint32, out_of_range
from llm_datadist.errors import invalid

_HOST_AND_PORT = re.compile(r"(?:\[(?P<bracketed>[^\[\]]+)\]|(?P<plain>[^:\[\]]+)):(?P<port>[^:]*)")
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_MAX_HOST_NAME = 253

#: family, kind, protocol, canonical name and address
AddressInfo: TypeAlias = tuple[Any, Any, int, str, tuple[Any, ...]]

#: what to do about one that `lacks_zone`
LACKS_ZONE = "a link-local address needs its interface: fe80::1%eth0"


class Endpoint(NamedTuple):
    """Where a cluster listens: an IP address or host name, and a TCP port. Spec 3.11, 5.1.

    It is the pair that look-ups take, and prints as `1.2.3.4:5` or `[::1]:5`.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, name: str = "the address", *, form: str = "host:port") -> Endpoint:
        """The endpoint that `host:port` or `[ipv6]:port` names. Spec 5.1, decision O34.

        Raises LLMException for text of another form, ValueError when the port is no number of
        [0, 65535]. `name` is what the messages call the text, `form` what they ask for.
        """
        found = _HOST_AND_PORT.fullmatch(text)
        if found is None:
            raise invalid(f'{name} must be "{form}" or "[ipv6]:port", got {text!r}')
        if found["bracketed"] and not _is_ipv6(found["bracketed"]):
            raise invalid(f"{name} has no IPv6 address between its brackets: {text!r}")
        return cls(found["bracketed"] or found["plain"], _parse_port(name, found["port"]))

    @classmethod
    def of(cls, sockaddr: tuple[Any, ...]) -> Endpoint:
        """That of a socket's address; one that is link-local keeps its zone: `fe80::1%eth0`."""
        host, zone = str(sockaddr[0]), sockaddr[3] if len(sockaddr) > 3 else 0
        if zone and "%" not in host:
            name = str(zone)
            with suppress(OSError):  # the interface is gone
                name = socket.if_indextoname(zone)
            host = f"{host}%{name}"
        return cls(host, sockaddr[1])

    @property
    def lacks_zone(self) -> bool:
        """Whether it is a link-local address that does not say on which interface."""
        return self.host.lower().startswith("fe80:") and "%" not in self.host

    @property
    def sockaddr(self) -> tuple[Any, ...]:
        """What `bind` takes, which reads no zone in text. Raises OSError for a zone of no name."""
        host, _, zone = self.host.partition("%")
        if not zone:
            return self.host, self.port
        index = int(zone) if zone.isdigit() else socket.if_nametoindex(zone)
        return host, self.port, 0, index

    def look_up(self) -> list[AddressInfo]:
        """What `getaddrinfo` says of it, which may wait for long. Raises OSError."""
        try:
            return socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except UnicodeError as error:  # a part that is empty, or too long
            raise socket.gaierror(socket.EAI_NONAME, f"{self.host!r} is no host name") from error

    @property
    def is_literal(self) -> bool:
        """Whether the host is an IPv4 or IPv6 address rather than a name to be looked up."""
        return is_ip_literal(self.host)

    @property
    def is_loopback(self) -> bool:
        """Whether only this host reaches it."""
        return self.is_literal and ipaddress.ip_address(self.host).is_loopback


def is_ip_literal(host: str) -> bool:
    """Whether `host` is a complete IPv4 or IPv6 address."""
    if "\0" in host:
        return False
    address, _, zone = host.partition("%")
    if ":" not in address:
        return not zone and _is_packed(socket.AF_INET, host)
    has_zone = "%" in host
    return bool(zone) == has_zone and "%" not in zone and _is_packed(socket.AF_INET6, address)


def ipv4_to_int(text: str) -> int:
    """IPv4 by the rules of inet_aton, little-endian: "1.2.3.4" is 0x04030201. Spec 3.11.

    Raises RuntimeError when it is none.
    """
    number = _ipv4(text)
    if number is None:
        raise RuntimeError(f"{text!r} is no IPv4 address")
    return number


def parse_ip(text: str) -> int | str:
    """What stands for an address in an ip list: IPv4 as an int, all else as text. Spec 3.11, O34.

    Raises RuntimeError when it is neither an IP address nor a possible host name. Names are looked
    up when the link is made.
    """
    number = _ipv4(text)
    if number is not None:
        return number
    if not is_host(text):
        raise RuntimeError(f"{text!r} is no IP address and no host name")
    return text


def is_host(text: str) -> bool:
    """Whether that is an IP address, or may be a host's name."""
    return _ipv4(text) is not None or is_ip_literal(text) or _is_host_name(text)


def host_of(ip: int | str) -> str:
    """The text of an entry of an ip list, the reverse of `parse_ip`. Spec 3.11.

    Raises ValueError when an int has more than 32 bits.
    """
    if isinstance(ip, str):
        return ip
    return socket.inet_ntoa(check_uint32("ip", ip).to_bytes(4, "little"))


def _ipv4(text: str) -> int | None:
    # inet_aton of glibc reads up to a blank and takes no notice of what follows
    if text.split() != [text] or "\0" in text:
        return None
    try:
        return int.from_bytes(socket.inet_aton(text), "little")
    except OSError as error:
        _require_no_address(error)
        return None


def _is_packed(family: int, text: str) -> bool:
    try:
        socket.inet_pton(family, text)
    except OSError as error:
        _require_no_address(error)
        return False
    return True


def _require_no_address(error: OSError) -> None:
    """What says that a text is no address has no number: `pass_on_handlers` cannot tell."""
    if type(error) is not OSError:
        raise error


def _is_ipv6(host: str) -> bool:
    return is_ip_literal(host) and ":" in host


def _is_host_name(text: str) -> bool:
    labels = text.removesuffix(".").split(".")
    # with a number at the end it is an IPv4 address gone wrong
    return (
        len(text) <= _MAX_HOST_NAME
        and all(_LABEL.fullmatch(label) for label in labels)
        and not labels[-1].isdigit()
    )


def _parse_port(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > _MAX_HOST_NAME:
        raise out_of_range(f"the port of {name} must be a number, got {text!r}")
    return check_uint16(f"the port of {name}", int(text))
