"""How fast a simulated line looks to the meter: never faster than it is, and soon as fast."""

import math
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.speed import Speed, SpeedMeter


@dataclass
class Line:
    """A line of `rate` bytes per second and a round trip of `rtt`; heartbeats take no room on it."""

    rate: float
    rtt: float
    meter: SpeedMeter = field(default_factory=SpeedMeter)
    now: float = 0.0
    busy_until: float = 0.0
    echoes: deque[tuple[float, int]] = field(default_factory=deque)

    def send(self, size: int) -> None:
        self.busy_until = max(self.busy_until, self.now) + size / self.rate
        if self.meter.sent(size, self.now):
            self.beat()

    def beat(self) -> None:
        number = self.meter.beat(self.now)
        self.echoes.append((max(self.busy_until, self.now) + self.rtt, number))

    def pass_time(self, seconds: float, late: float = 0.0) -> None:
        until = self.now + seconds
        while self.echoes and self.echoes[0][0] + late <= until:
            at, number = self.echoes.popleft()
            self.now = max(self.now, at + late)
            self.meter.echoed(number, self.now)
        self.now = until


@pytest.mark.parametrize("mbit", [1, 10, 100, 1000])
@pytest.mark.parametrize("rtt", [0.0001, 0.05])
def test_a_line_is_measured_by_the_messages_on_it(mbit: int, rtt: float) -> None:
    line = Line(mbit * 125_000.0, rtt)
    line.beat()
    line.pass_time(1.0)
    assert line.meter.speed is None
    line.send(1_000_000)
    line.pass_time(30.0)
    assert line.meter.speed is not None
    assert line.meter.speed.rtt == pytest.approx(rtt)
    assert line.meter.speed.rate == pytest.approx(line.rate, rel=0.01)


def test_what_takes_no_time_does_not_measure_a_fast_line() -> None:
    line = Line(1e9, 0.0001)
    line.beat()
    line.pass_time(1.0)
    line.send(10_000)
    line.pass_time(1.0)
    assert line.meter.speed is None, "too small to tell anything"
    line.send(100_000)
    line.pass_time(1.0)
    assert line.meter.speed == Speed(pytest.approx(0.0001), math.inf)
    line.send(8_000_000)
    line.pass_time(1.0)
    assert line.meter.speed.rate == pytest.approx(1e9)
    for later in range(8):
        assert line.meter.speed.rate == pytest.approx(1e9), later
        line.send(100_000)
        line.pass_time(1.0)
    assert line.meter.speed.rate == math.inf, "what is not measured any more is tried again"


def test_one_late_echo_does_not_make_a_fast_line_slow() -> None:
    line = Line(1e9, 0.0001)
    line.beat()
    line.pass_time(1.0)
    line.send(100_000)
    line.pass_time(1.0, late=0.05)
    assert line.meter.speed is not None
    assert line.meter.speed.rate < 1e7, "it is all there is to go by"
    line.send(100_000)
    line.pass_time(1.0)
    assert line.meter.speed.rate == math.inf


def test_small_messages_send_no_heartbeats_of_their_own() -> None:
    meter = SpeedMeter()
    assert not any(meter.sent(SpeedMeter.CHASE - 1, float(i)) for i in range(100))
    assert meter.sent(SpeedMeter.CHASE, 100.0)


def test_pauses_between_messages_are_not_the_lines() -> None:
    line = Line(1e6, 0.01)
    line.beat()
    line.pass_time(1.0)
    for _ in range(20):
        line.send(5000)
        line.pass_time(0.5)
    line.send(100_000)
    line.pass_time(1.0)
    assert line.meter.speed is not None
    assert line.meter.speed.rate == pytest.approx(1e6)


def test_one_chase_is_under_way_at_a_time() -> None:
    line = Line(1e6, 0.01)
    line.beat()
    line.pass_time(1.0)
    for _ in range(20):
        line.send(100_000)
    assert len(line.echoes) == 1
    line.pass_time(10.0)
    assert line.meter.speed is not None


def test_a_lost_connection_forgets_what_is_under_way_and_keeps_what_is_known() -> None:
    line = Line(1e6, 0.01)
    line.beat()
    line.pass_time(1.0)
    line.send(100_000)
    line.pass_time(1.0)
    known = line.meter.speed
    line.send(100_000)
    line.meter.forget()
    line.pass_time(1.0)
    assert line.meter.speed == known
    line.send(100_000)
    assert line.echoes, "a new chase can begin"


def test_a_chase_that_never_left_does_not_end_the_measuring() -> None:
    line = Line(1e6, 0.01)
    line.beat()
    line.pass_time(1.0)
    line.send(100_000)
    line.echoes.clear()
    for _ in range(3):
        line.beat()
        line.pass_time(1.0)
        line.send(100_000)
        line.pass_time(1.0)
    assert line.meter.speed is not None
    assert line.meter.speed.rate == pytest.approx(1e6)


@pytest.mark.parametrize("number", [0, 1, 7, 1 << 62])
def test_an_echo_of_nothing_changes_nothing(number: int) -> None:
    meter = SpeedMeter()
    meter.echoed(number, 1.0)
    assert meter.speed is None


@settings(max_examples=200)
@given(
    st.floats(1e5, 1e10),
    st.floats(0, 0.2),
    st.lists(
        st.tuples(st.integers(1, 3_000_000), st.floats(0, 0.5), st.floats(0, 0.1), st.booleans()),
        min_size=1,
        max_size=60,
    ),
)
def test_whatever_is_sent_and_however_late_echoes_are_no_line_looks_faster_than_it_is(
    rate: float, rtt: float, script: list[tuple[int, float, float, bool]]
) -> None:
    line = Line(rate, rtt)
    line.beat()
    line.pass_time(1.0)
    for size, pause, late, beat in script:
        line.send(size)
        if beat:
            line.beat()
        line.pass_time(pause, late)
        if line.meter.speed is not None:
            # Infinite is what takes 64 KiB and more in no measurable time, and nothing slower.
            fast = 65536 / rate <= 5e-4 * 1.001
            assert line.meter.speed.rate <= rate * 1.001 + 1 or (fast and line.meter.speed.rate == math.inf)
            assert line.meter.speed.rtt >= rtt * 0.999
