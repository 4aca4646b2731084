"""LLMClusterInfo: whom to link to, and where it listens. Spec 3.11."""

from __future__ import annotations

from llm_datadist.checks import check_type, check_uint16, check_uint32, check_uint64
from llm_datadist.endpoint import Endpoint, host_of, parse_ip
from llm_datadist.near_names import NamedAttributes
from llm_datadist.types import LLMRole


class LLMClusterInfo(NamedAttributes):
    """One peer of `link_clusters` or `unlink_clusters`. Spec 3.11.

    Of several devices it has one address of ours and one of the peer's for each, in their order.

    IPv4 addresses are held as little-endian ints, as programs expect to read them back. IPv6
    addresses and host names, which the reference does not know, are held as text. Names that are
    no attributes are treated as by LLMConfig.
    """

    def __init__(self) -> None:
        self._remote_cluster_id: int | None = None
        self._remote_role_type: LLMRole | int | None = None
        self._local_ip_info_list: list[tuple[int | str, int]] = []
        self._remote_ip_info_list: list[tuple[int | str, int]] = []

    def __repr__(self) -> str:
        addresses = ", ".join(map(str, self.remote_endpoints)) or "no address"
        return f"LLMClusterInfo(remote_cluster_id={self._remote_cluster_id}, {addresses})"

    @property
    def remote_cluster_id(self) -> int | None:
        """The peer's cluster id; None until it is set. Spec 3.11.

        The setter raises TypeError, ValueError unless it gets a uint64.
        """
        return self._remote_cluster_id

    @remote_cluster_id.setter
    def remote_cluster_id(self, value: int) -> None:
        self._remote_cluster_id = check_uint64("remote_cluster_id", value)

    @property
    def remote_role_type(self) -> LLMRole | int | None:
        """The peer's role. Nothing reads it. Spec 3.11.

        The setter raises TypeError unless it gets an LLMRole or an int.
        """
        return self._remote_role_type

    @remote_role_type.setter
    def remote_role_type(self, value: LLMRole | int) -> None:
        self._remote_role_type = check_type("remote_role_type", value, LLMRole, int)

    @property
    def local_ip_info_list(self) -> list[tuple[int | str, int]]:
        """(ip, port) pairs of this cluster, in the order of their arrival. Spec 3.11."""
        return self._local_ip_info_list

    @property
    def remote_ip_info_list(self) -> list[tuple[int | str, int]]:
        """(ip, port) pairs of the peer, in the order of their arrival. Spec 3.11."""
        return self._remote_ip_info_list

    @property
    def remote_endpoints(self) -> list[Endpoint]:
        """`remote_ip_info_list` with every host as text."""
        return [Endpoint(host_of(ip), port) for ip, port in self._remote_ip_info_list]

    def append_local_ip_info(self, ip: int | str, port: int) -> None:
        """Add an address of this cluster. The port is never used; 0 will do. Spec 3.11.

        Raises as `append_remote_ip_info` does.
        """
        self._local_ip_info_list.append(_ip_info(ip, port))

    def append_remote_ip_info(self, ip: int | str, port: int) -> None:
        """Add an address at which the peer listens. Spec 3.11, decision O34.

        `ip` is text (IPv4, IPv6 or a host name) or an IPv4 address as a little-endian int.
        Raises TypeError for another type; ValueError when the port is no uint16 or the int no
        uint32; RuntimeError for text that is no address and no host name.
        """
        self._remote_ip_info_list.append(_ip_info(ip, port))


def _ip_info(ip: object, port: object) -> tuple[int | str, int]:
    address = check_type("ip", ip, int, str)
    number = check_uint16("port", port)
    if isinstance(address, str):
        return parse_ip(address), number
    return check_uint32("ip", address), number
