"""The addresses of this machine, as Linux tells them."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from contextlib import suppress

#: any that is out there; nothing is sent
_ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}

_SIOCGIFADDR, _SIOCGIFFLAGS = 0x8915, 0x8913
_IFF_UP = 0x1
_IFREQ, _NAME_NBYTES = struct.Struct("16s24x"), 15

_IF_INET6 = "/proc/net/if_inet6"
_SCOPE_GLOBAL = 0x00
#: IFA_F_DEPRECATED, IFA_F_TENTATIVE, IFA_F_DADFAILED, IFA_F_TEMPORARY
_NOT_FOR_OTHERS = 0x20 | 0x40 | 0x08 | 0x01


def address_of_route(family: socket.AddressFamily) -> list[str]:
    """The address that this machine has on its way out; none if it has no default route."""
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as trial:
        trial.connect((_ELSEWHERE[family], 9))
        return _usable([str(trial.getsockname()[0])])
    return []


def addresses_of_interfaces(family: socket.AddressFamily) -> list[str]:
    """Those of interfaces that are up, in their order; of each the first, for IPv4."""
    return _usable(_ipv6() if family == socket.AF_INET6 else _ipv4())


def _usable(addresses: list[str]) -> list[str]:
    parsed = [ipaddress.ip_address(address) for address in addresses]
    return [str(each) for each in parsed if not (each.is_loopback or each.is_link_local)]


def _ipv4() -> list[str]:
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = _IFREQ.pack(name.encode()[:_NAME_NBYTES])
            with suppress(OSError):  # it has none
                (flags,) = struct.unpack_from("H", fcntl.ioctl(asked, _SIOCGIFFLAGS, request), 16)
                if flags & _IFF_UP:
                    answer = fcntl.ioctl(asked, _SIOCGIFADDR, request)
                    found.append(socket.inet_ntoa(answer[20:24]))
    return found


def _ipv6() -> list[str]:
    """By the number of the interface. There is no such file where IPv6 is off."""
    found = []
    with suppress(OSError), open(_IF_INET6, encoding="ascii") as lines:
        for line in lines:
            address, index, _, scope, flags, _ = line.split()
            if int(scope, 16) == _SCOPE_GLOBAL and not int(flags, 16) & _NOT_FOR_OTHERS:
                found.append(
                    (int(index, 16), socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address)))
                )
    return [address for _, address in sorted(found, key=lambda each: each[0])]
