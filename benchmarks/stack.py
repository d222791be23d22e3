"""What stands between replay silos and a trunk: broker, workers and a slow line, as real processes."""

import json
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.figures import Sample, growth
from silo_agent.processes import Processes

_START_S = 120.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Stack:
    """A broker, workers, and a relay if the line is to be slow. `endpoint` is where silos attach."""

    def __init__(
        self,
        processes: Processes,
        *,
        worker: Iterable[str],
        workers: int = 1,
        rtt_ms: float = 0.0,
        mbit: float = 0.0,
    ) -> None:
        """Start them; `worker` are options of `trunkline bench worker`. Raises if one does not start."""
        self.endpoint = broker = processes.broker(timeout=_START_S)
        self._meters = {f"worker-{number}": _Meter() for number in range(workers)}
        for name, meter in self._meters.items():
            options = ("bench", "worker", "--broker", broker, "--name", name, *worker)
            processes.start(name, *options, on_line=meter.hear)
        names = ["broker", *self._meters]
        if rtt_ms or mbit:
            relay = ("relay", "--listen", "tcp://127.0.0.1:0", "--to", broker)
            shape = ("--rtt-ms", f"{rtt_ms:g}", "--mbit", f"{mbit:g}")
            self.endpoint = processes.listener("relay", "relaying ", *relay, *shape, timeout=_START_S)
            names.append("relay")
        for name, meter in self._meters.items():
            processes.wait(name, meter.begun, _START_S)
        self._running = {name: processes[name] for name in names}

    def busy(self, begin: float, end: float) -> float:
        """The share of the time between two moments that a worker's trunk computed, the workers' mean."""
        return sum(growth(meter.counter("busy"), begin, end) for meter in self._meters.values()) / len(
            self._meters
        )

    def timeline(self, begin: float, end: float, every: float) -> list[list[float]]:
        """`busy` in slices of `every` seconds: `[seconds since begin, share]`."""
        slices = int((end - begin) / every)
        starts = [begin + number * every for number in range(slices)]
        return [[start - begin, self.busy(start, start + every)] for start in starts]

    def tokens_per_pass(self, begin: float, end: float) -> float:
        """Mean tokens of a pass, forward or backward, between two moments."""
        tokens, passes = (
            sum(growth(meter.counter(what), begin, end) for meter in self._meters.values())
            for what in ("tokens", "passes")
        )
        return tokens / passes if passes else 0.0

    def settle(self, moment: float) -> None:
        """Wait until every worker has told its counters of `moment`. Raises if one has ended."""
        until = time.monotonic() + 5.0
        while any(meter.latest < moment for meter in self._meters.values()) and time.monotonic() < until:
            for process in self._running.values():
                process.check()
            time.sleep(0.02)

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time that each process has used so far."""
        return {name: _cpu_seconds(process.pid) for name, process in self._running.items()}

    def broker_bytes(self) -> int:
        """Memory of the broker that is resident now."""
        return self._running["broker"].resident_bytes()


class _Meter:
    """What a worker said of itself (`benchmarks.meter`)."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self._lines: list[dict[str, float]] = []

    def hear(self, line: str) -> None:
        self._lines.append(json.loads(line))
        self.begun.set()

    @property
    def latest(self) -> float:
        return self._lines[-1]["at"]

    def counter(self, name: str) -> list[Sample]:
        return [(line["at"], line[name]) for line in list(self._lines)]


def _cpu_seconds(pid: int) -> float:
    # The name, in brackets, may hold anything; user and system time are the 14th and 15th field.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS
