"""The broker's Prometheus metrics, read from its state at scrape time."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from broker.server import Server
from codec.errors import UsageError


class _BrokerMetrics(Collector):
    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        traffic = self._server.traffic
        messages = CounterMetricFamily("trunkline_messages", "Messages routed, by kind.", labels=["kind"])
        tensors = CounterMetricFamily("trunkline_tensor_bytes", "Tensor bytes routed.", labels=["kind"])
        for kind, number in list(traffic.messages.items()):
            messages.add_metric([kind], number)
            tensors.add_metric([kind], traffic.bytes.get(kind, 0))
        yield messages
        yield tensors
        yield CounterMetricFamily("trunkline_refused", "Messages refused as malformed.", traffic.refused)
        peers = GaugeMetricFamily("trunkline_peers", "Attached peers, by role.", labels=["role"])
        attached = list(self._server.router.peers.values())
        for role in ("silo", "worker"):
            peers.add_metric([role], sum(peer.role == role for peer in attached))
        yield peers


def serve_metrics(address: str, server: Server) -> str:
    """Serve `/metrics` at `HOST:PORT` on a thread; its URL. Raises `UsageError` if it cannot."""
    host, _, port = address.rpartition(":")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_BrokerMetrics(server))
    try:
        httpd, _ = start_http_server(int(port), addr=host or "127.0.0.1", registry=registry)
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(
            f"metrics cannot be served at {address!r}: {error}",
            side="broker",
            hint="Write it as HOST:PORT, with a port that is free: --metrics 127.0.0.1:9100.",
        ) from None
    return f"http://{host or '127.0.0.1'}:{httpd.server_port}/metrics"
