"""Network addresses. Spec 3.11, 5.1, decision O34."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_datadist.endpoint import Endpoint, host_of, ipv4_to_int, parse_ip
from llm_datadist.errors import LLMException, LLMStatusCode

addresses = st.ip_addresses().map(str)
ports = st.integers(0, 65535)


@given(host=addresses, port=ports)
def test_what_an_endpoint_prints_can_be_parsed(host: str, port: int) -> None:
    assert Endpoint.parse(str(Endpoint(host, port))) == (host, port)


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("1.2.3.4:5", ("1.2.3.4", 5)),
        ("[::1]:0", ("::1", 0)),
        ("[fe80::1%eth0]:7", ("fe80::1%eth0", 7)),
        ("node-7.example:65535", ("node-7.example", 65535)),
    ],
)
def test_an_endpoint_is_read_from_text(text: str, endpoint: tuple[str, int]) -> None:
    assert Endpoint.parse(text) == endpoint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1.2.3.4",
        "1.2.3.4:5:6",
        ":5",
        "::1:5",
        "[::1]",
        "[1.2.3.4]:5",
        "[]:5",
        "[::1]5",
        "[x]:1",
    ],
)
def test_text_of_another_form_is_param_invalid(text: str) -> None:
    with pytest.raises(LLMException, match=r"llm\.listenIpInfo") as caught:
        Endpoint.parse(text, "llm.listenIpInfo")
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.parametrize("port", ["", "x", "-1", "1.0", " 1", "²", "65536"])
def test_a_port_that_is_none_is_a_value_error(port: str) -> None:
    with pytest.raises(ValueError, match="port of the address"):
        Endpoint.parse(f"1.2.3.4:{port}")


@pytest.mark.parametrize(
    ("host", "is_literal"), [("1.2.3.4", True), ("::1", True), ("localhost", False), ("1.2", False)]
)
def test_only_a_complete_address_is_literal(host: str, is_literal: bool) -> None:
    assert Endpoint(host, 1).is_literal is is_literal


@pytest.mark.shows("cluster_info.addresses")
@pytest.mark.parametrize(
    ("text", "number"),
    [("1.2.3.4", 0x04030201), ("127.1", 0x0100007F), ("0x7f.0.0.1", 0x0100007F), ("1", 0x01000000)],
)
def test_ipv4_becomes_a_little_endian_int_by_the_rules_of_inet_aton(text: str, number: int) -> None:
    assert ipv4_to_int(text) == number


@given(st.ip_addresses(v=4).map(str))
def test_an_ipv4_address_comes_back_from_its_int(text: str) -> None:
    assert host_of(ipv4_to_int(text)) == text


@pytest.mark.parametrize("text", ["::1", "fe80::1", "localhost", "node_7.example.", "a1"])
def test_ipv6_and_host_names_stay_text(text: str) -> None:
    assert (parse_ip(text), host_of(text)) == (text, text)


@pytest.mark.shows("cluster_info.addresses")
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "1.2.3.4 x",
        "1.2.3.4.5",
        "1.2.3.4\0",
        "10.0.0.300",
        "a..b",
        "-a",
        "a b",
        ":::",
        "a" * 64,
        "a." * 127 + "a",
    ],
)
def test_text_that_is_no_address_and_no_name_is_a_runtime_error(text: str) -> None:
    with pytest.raises(RuntimeError, match="no IP address and no host name"):
        parse_ip(text)


@pytest.mark.parametrize("number", [-1, 2**32])
def test_an_int_of_more_than_32_bits_is_no_address(number: int) -> None:
    with pytest.raises(ValueError, match="ip must be in"):
        host_of(number)


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".example"])
def test_what_no_host_can_be_called_is_not_found(host: str) -> None:
    """As a name that nobody has, and not by the error of a codec."""
    with pytest.raises(OSError, match="is no host name"):
        Endpoint(host, 80).look_up()
