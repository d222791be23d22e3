"""Prometheus metrics: the broker's, read from its state at scrape time, and how processes serve their own."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from broker.pool import Worker
from broker.server import Server
from codec.errors import Side, UsageError


class BrokerMetrics(Collector):
    """What is routed, who is attached, and what waits in front of each worker."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        """Called at every scrape."""
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
        yield from _workers([peer for peer in attached if isinstance(peer, Worker)])


def _workers(attached: list[Worker]) -> Iterator[Metric]:
    figures: dict[tuple[str, str], Callable[[Worker], int]] = {
        ("waiting_requests", "Requests that wait in front of a worker."): lambda w: w.inbox.waiting,
        ("waiting_tokens", "Tokens of these requests."): lambda w: w.inbox.tokens_waiting,
        ("under_way_tokens", "Tokens sent to a worker and not answered."): lambda w: w.inbox.tokens_under_way,
        ("load", "Sessions and runs of a worker."): lambda w: w.load,
        ("draining", "1 if a worker takes nothing new."): lambda w: w.draining,
    }
    for (name, what), figure in figures.items():
        family = GaugeMetricFamily(f"trunkline_worker_{name}", what, labels=["worker", "alias"])
        for worker in attached:
            family.add_metric([worker.name, worker.alias.hex()], figure(worker))
        yield family


def serve_metrics(address: str, collector: Collector, side: Side) -> str:
    """Serve `/metrics` at `HOST:PORT` on a thread; its URL. Raises `UsageError` if it cannot."""
    host, _, port = address.rpartition(":")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    try:
        httpd, _ = start_http_server(int(port), addr=host or "127.0.0.1", registry=registry)
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(
            f"metrics cannot be served at {address!r}: {error}",
            side=side,
            hint="Write it as HOST:PORT, with a port that is free: --metrics 127.0.0.1:9100.",
        ) from None
    return f"http://{host or '127.0.0.1'}:{httpd.server_port}/metrics"
