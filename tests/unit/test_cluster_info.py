"""LLMClusterInfo. Spec 3.11."""

from __future__ import annotations

from typing import Any

import pytest

from llm_datadist.cluster_info import LLMClusterInfo
from llm_datadist.types import LLMRole

LISTS = ["local", "remote"]


def append(info: LLMClusterInfo, side: str, ip: Any, port: Any) -> None:
    getattr(info, f"append_{side}_ip_info")(ip, port)


def ip_list(info: LLMClusterInfo, side: str) -> list[tuple[int | str, int]]:
    ips: list[tuple[int | str, int]] = getattr(info, f"{side}_ip_info_list")
    return ips


@pytest.mark.shows("cluster_info")
def test_a_new_info_knows_nothing() -> None:
    info = LLMClusterInfo()
    assert (info.remote_cluster_id, info.remote_role_type) == (None, None)
    assert (info.local_ip_info_list, info.remote_ip_info_list) == ([], [])


@pytest.mark.shows("cluster_info")
@pytest.mark.parametrize("cluster_id", [0, 2**64 - 1])
def test_the_cluster_id_is_any_uint64(cluster_id: int) -> None:
    info = LLMClusterInfo()
    info.remote_cluster_id = cluster_id
    assert info.remote_cluster_id == cluster_id


@pytest.mark.shows("cluster_info")
@pytest.mark.parametrize(
    ("cluster_id", "error"),
    [(None, TypeError), ("1", TypeError), (True, TypeError), (-1, ValueError), (2**64, ValueError)],
)
def test_another_cluster_id_is_refused(cluster_id: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="remote_cluster_id"):
        LLMClusterInfo().remote_cluster_id = cluster_id


@pytest.mark.shows("cluster_info")
@pytest.mark.parametrize("role", [LLMRole.DECODER, 1])
def test_the_role_is_a_role_or_an_int(role: int) -> None:
    info = LLMClusterInfo()
    info.remote_role_type = role
    assert info.remote_role_type == role


@pytest.mark.shows("cluster_info")
@pytest.mark.parametrize("role", [None, "1"])
def test_another_role_is_a_type_error(role: Any) -> None:
    with pytest.raises(TypeError, match="remote_role_type only support"):
        LLMClusterInfo().remote_role_type = role


@pytest.mark.shows("cluster_info", "cluster_info.addresses")
@pytest.mark.parametrize("side", LISTS)
@pytest.mark.parametrize(
    ("ip", "stored"),
    [
        ("1.2.3.4", 0x04030201),
        ("127.1", 0x0100007F),
        ("0x7f.0.0.1", 0x0100007F),
        ("1", 0x01000000),
        (0x04030201, 0x04030201),
        ("::1", "::1"),
        ("node7", "node7"),
    ],
)
def test_addresses_are_kept_in_order(side: str, ip: int | str, stored: int | str) -> None:
    info = LLMClusterInfo()
    append(info, side, ip, 26000)
    append(info, side, "0.0.0.0", 0)
    assert ip_list(info, side) == [(stored, 26000), (0, 0)]


@pytest.mark.shows("cluster_info.addresses")
@pytest.mark.parametrize("side", LISTS)
@pytest.mark.parametrize(
    ("ip", "port", "error"),
    [
        (None, 1, TypeError),
        (1.5, 1, TypeError),
        (b"1.2.3.4", 1, TypeError),
        (True, 1, TypeError),
        ("1.2.3.4.5", 1, RuntimeError),
        ("10.0.0.300", 1, RuntimeError),
        ("", 1, RuntimeError),
        (2**32, 1, ValueError),
        ("1.2.3.4", "1", TypeError),
        ("1.2.3.4", None, TypeError),
        ("1.2.3.4", -1, ValueError),
        ("1.2.3.4", 65536, ValueError),
    ],
)
def test_what_is_no_address_is_refused_and_not_kept(
    side: str, ip: Any, port: Any, error: type[Exception]
) -> None:
    info = LLMClusterInfo()
    with pytest.raises(error):
        append(info, side, ip, port)
    assert ip_list(info, side) == []


def test_remote_endpoints_are_what_can_be_connected_to() -> None:
    info = LLMClusterInfo()
    info.append_remote_ip_info("1.2.3.4", 5)
    info.append_remote_ip_info("::1", 6)
    assert info.remote_endpoints == [("1.2.3.4", 5), ("::1", 6)]


def test_an_info_prints_whom_it_means() -> None:
    info = LLMClusterInfo()
    info.remote_cluster_id = 7
    info.append_remote_ip_info("::1", 6)
    assert repr(info) == "LLMClusterInfo(remote_cluster_id=7, [::1]:6)"


@pytest.mark.shows("cluster_info")
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("remote_cluster_ids", "remote_cluster_id"),
        ("remote_clusterid", "remote_cluster_id"),
        ("remoteRoleType", "remote_role_type"),
        ("remote_ip_infos", "remote_ip_info_list"),
    ],
)
def test_a_slip_of_an_attribute_is_refused_and_the_nearest_named(name: str, meant: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{name}': is '{meant}' meant"):
        setattr(LLMClusterInfo(), name, 1)


def test_an_attribute_of_a_newer_release_is_warned_of() -> None:
    info: Any = LLMClusterInfo()
    with pytest.warns(UserWarning, match="LLMClusterInfo does not know 'weight'"):
        info.weight = 1
    assert info.weight == 1
