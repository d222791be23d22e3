"""The meter's arithmetic, on a clock of the test's own."""

import json
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from benchmarks import meter
from benchmarks.meter import Meter, tell

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time."""
    now = [0.0]
    monkeypatch.setattr(meter, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def set_to(moment: float) -> None:
        now[0] = moment

    return set_to


def read(counter: Meter) -> tuple[float, int, int]:
    counters = counter.counters()
    return counters["busy"], int(counters["passes"]), int(counters["tokens"])


def test_a_pass_counts_while_it_is_under_way(at: Callable[[float], None]) -> None:
    counter = Meter()
    at(10)
    counter.begin(at_most=60.0)
    at(12)
    assert read(counter) == (2, 0, 0)
    at(13)
    counter.end(5)
    at(20)
    assert read(counter) == (3, 1, 5)


def test_what_is_slept_too_long_is_no_work(at: Callable[[float], None]) -> None:
    counter = Meter()
    counter.begin(at_most=2.0)
    at(1)
    assert read(counter)[0] == 1
    at(9)
    assert read(counter)[0] == 2
    counter.end(1)
    assert read(counter)[0] == 2


def test_it_tells_at_once_and_until_it_is_stopped() -> None:
    lines: list[str] = []
    stop, told = threading.Event(), threading.Event()

    def say(line: str) -> None:
        lines.append(line)
        told.set()

    thread = tell(Meter().counters, say, stop)
    assert told.wait(5)
    stop.set()
    thread.join(5)
    assert not thread.is_alive()
    assert json.loads(lines[0]).keys() == {"at", "busy", "passes", "tokens"}
