"""Where a broker may listen and a link may connect."""

from urllib.parse import urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broker.endpoint import check_endpoint, is_ipv6
from codec.errors import UsageError

parts = st.sampled_from(
    ["tcp://", "ipc://", "127.0.0.1", "localhost", "[::1]", "0.0.0.0", ":", "7", "0", "/x", "@"]
)


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:7555", "tcp://localhost:1", "tcp://[::1]:65535"])
def test_loopback_is_good(endpoint: str) -> None:
    check_endpoint(endpoint)
    assert is_ipv6(endpoint) == ("::1" in endpoint)


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "127.0.0.1:7555",
        "127.0.0.1",
        "tcp://",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1:port",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:-1",
        "tcp://:7555",
        "tcp://[::1",
        "tcp://127.0.0.1:7555/",
        "tcp://127.0.0.1:7555/x",
        "tcp://127.0.0.1:7555?x",
        "tcp://127.0.0.1:7555#x",
        "tcp://user@127.0.0.1:7555",
        "tcp://127.0.0.1:7555 ",
        "http://127.0.0.1:7555",
        "ipc:///tmp/x",
    ],
)
def test_what_is_no_endpoint_is_refused_with_an_example(endpoint: str) -> None:
    with pytest.raises(UsageError, match="is not an endpoint") as caught:
        check_endpoint(endpoint)
    assert repr(endpoint) in caught.value.what
    assert "tcp://127.0.0.1:7555" in caught.value.hint


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "10.0.0.1", "example.org", "[::]", "127.0.0.1.example.org"])
def test_beyond_loopback_is_refused_with_a_way_out(host: str) -> None:
    with pytest.raises(UsageError, match="beyond loopback") as caught:
        check_endpoint(f"tcp://{host}:7555", free_port=True)
    assert caught.value.at == "broker"
    assert "trunkline keys" in caught.value.hint


def test_port_0_is_for_listening_only() -> None:
    check_endpoint("tcp://127.0.0.1:0", free_port=True)
    with pytest.raises(UsageError, match="names no port"):
        check_endpoint("tcp://127.0.0.1:0")


@given(st.one_of(st.text(max_size=30), st.lists(parts, max_size=6).map("".join)))
@example("tcp://127.0.0.1:1[")
@example("tcp://127.0.0.1\uff0e0:1")
def test_nothing_but_loopback_passes(endpoint: str) -> None:
    try:
        check_endpoint(endpoint)
    except UsageError:
        return
    assert urlsplit(endpoint).hostname in ("127.0.0.1", "localhost", "::1")
    assert urlsplit(endpoint).port
