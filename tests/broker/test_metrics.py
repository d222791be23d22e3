"""The broker's Prometheus metrics."""

import urllib.request
from itertools import count
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from broker.metrics import BrokerMetrics, serve_metrics
from broker.parcel import Parcel
from broker.router import Router
from broker.server import Server
from codec.errors import UsageError
from codec.messages import Drain


def scrape(url: str) -> dict[tuple[str, str], float]:
    """Sample name and label value to value."""
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {(s.name, "".join(s.labels.values())): s.value for s in samples}


def test_what_passed_and_who_is_there_can_be_scraped(
    start_broker: Any,
    start_echo: Any,
    connect: Any,
    introduce: Any,
    opened: Any,
    ask: Any,
    extending: Any,
    until: Any,
) -> None:
    running = start_broker()
    url = serve_metrics("127.0.0.1:0", BrokerMetrics(running.server), "broker")
    assert scrape(url)["trunkline_peers", "worker"] == 0
    start_echo(running.endpoint)
    silo, numbers = connect(running.endpoint, introduce("silo")), count(1)
    opened(silo, "s", numbers)
    for _ in range(3):
        ask(silo, extending("s", next(numbers)), [b"12345"])
    until(lambda: scrape(url).get(("trunkline_messages_total", "Result")) == 3)
    samples = scrape(url)
    assert samples["trunkline_messages_total", "Extend"] == 3
    assert samples["trunkline_tensor_bytes_total", "Extend"] == 15
    assert samples["trunkline_tensor_bytes_total", "Result"] == 15
    assert samples["trunkline_refused_total", ""] == 0
    assert samples["trunkline_peers", "silo"] == samples["trunkline_peers", "worker"] == 1


def test_what_waits_for_a_worker_and_is_under_way_can_be_scraped(
    start_broker: Any, start_echo: Any, connect: Any, introduce: Any, opened: Any, extending: Any, until: Any
) -> None:
    running = start_broker()
    url = serve_metrics("127.0.0.1:0", BrokerMetrics(running.server), "broker")
    echo = start_echo(running.endpoint, credit=2)
    silo, numbers = connect(running.endpoint, introduce("silo")), count(1)
    opened(silo, "s", numbers)
    (worker,) = (peer for peer in running.server.router.peers.values() if peer.role == "worker")
    label = f"{worker.alias.hex()}echo"
    assert scrape(url)["trunkline_worker_load", label] == 1
    echo.silent.set()
    for _ in range(5):
        silo.send(Parcel.of(extending("s", next(numbers))))
    until(lambda: scrape(url)["trunkline_worker_waiting_requests", label] == 3)
    echo.link.send(Parcel.of(Drain()))
    until(lambda: scrape(url)["trunkline_worker_draining", label] == 1)
    samples = scrape(url)
    assert samples["trunkline_worker_waiting_tokens", label] == 3
    assert samples["trunkline_worker_under_way_tokens", label] == 2


@pytest.mark.parametrize("address", ["", "here", "127.0.0.1:", "127.0.0.1:port", "127.0.0.1:99999", "[x]:1"])
def test_an_address_that_cannot_be_served_is_refused(address: str) -> None:
    server = Server("tcp://127.0.0.1:0", Router())
    try:
        with pytest.raises(UsageError, match="metrics cannot be served") as caught:
            serve_metrics(address, BrokerMetrics(server), "broker")
    finally:
        server.close()
    assert repr(address) in caught.value.what
    assert caught.value.at == "broker"
    assert "HOST:PORT" in caught.value.hint
