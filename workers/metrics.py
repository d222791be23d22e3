"""A worker's Prometheus metrics, read from its state at scrape time."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from workers.service import TrunkService


class WorkerMetrics(Collector):
    """How busy the trunk is, what it did, and the memory that silos hold."""

    def __init__(self, service: TrunkService) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Called at every scrape."""
        busy, holdings = self._service.busy, self._service.holdings
        yield CounterMetricFamily(
            "trunkline_worker_busy_seconds", "Seconds of computation since the start.", busy.seconds
        )
        passes = CounterMetricFamily("trunkline_worker_passes", "Passes by kind.", labels=["kind"])
        tokens = CounterMetricFamily("trunkline_worker_tokens", "Tokens by kind of pass.", labels=["kind"])
        for kind, number in list(busy.passes.items()):
            passes.add_metric([kind], number)
            tokens.add_metric([kind], busy.tokens.get(kind, 0))
        yield passes
        yield tokens
        memory = GaugeMetricFamily("trunkline_worker_memory_bytes", "What silos hold.", labels=["what"])
        memory.add_metric(["kv"], holdings.memory.held)
        memory.add_metric(["activations"], self._service.activations.held)
        yield memory
        yield CounterMetricFamily(
            "trunkline_worker_evicted_sessions", "Sessions closed for others' memory.", holdings.evicted
        )
