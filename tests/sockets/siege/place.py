"""What is besieged: a broker, a worker, and one more worker that a hostile broker has, as processes."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from silo_agent.processes import Process, Processes

WORKER = ("--kv-memory", "64", "--activation-memory", "64", "--drain", "0")
_MIB = 1 << 20
_UNEXPECTED = re.compile("Traceback|failed|broke|any more")


class Place:
    """Starts them; `grown` says by how much they grew since `settle`."""

    def __init__(self, logs: Path, impostor: str) -> None:
        self._logs = logs
        self._processes = Processes(logs)
        self._processes.__enter__()
        self.endpoint = self._processes.broker("--silence", "3")
        self._before: dict[str, int] = {}
        for name, broker in (("worker", self.endpoint), ("deceived", impostor)):
            self._processes.start(name, "worker", "--broker", broker, "--model", "tiny", *WORKER)

    def close(self) -> None:
        """End all."""
        self._processes.__exit__()

    def settle(self) -> None:
        """What they have now is what they may have."""
        self._before = {process.name: process.resident_bytes() for process in self._running()}

    def grown(self) -> dict[str, float]:
        """By how many MiB each process grew."""
        return {p.name: (p.resident_bytes() - self._before[p.name]) / _MIB for p in self._running()}

    def faults(self) -> list[str]:
        """Who ended, and what the logs say that they should not."""
        return [*self._ended(), *self._unexpected()]

    def _running(self) -> list[Process]:
        return [self._processes[name] for name in ("broker", "worker", "deceived")]

    def _ended(self) -> Iterator[str]:
        for process in self._running():
            if not process.running():
                yield f"{process.name} ended: {process.last_words()}"

    def _unexpected(self) -> Iterator[str]:
        for log in sorted(self._logs.glob("*.log")):
            for line in log.read_text(errors="replace").splitlines():
                event = json.loads(line) if line.startswith("{") else {"level": "?", "event": line}
                if event["level"] == "error" or _UNEXPECTED.search(event["event"]):
                    yield f"{log.stem}: {line}"


def watch(place: Place, ended: threading.Event, peaks: dict[str, float]) -> None:
    """Note the most that each process grew by, until `ended`."""
    while not ended.wait(0.25):
        for name, grown in place.grown().items():
            peaks[name] = max(peaks.get(name, 0.0), grown)
