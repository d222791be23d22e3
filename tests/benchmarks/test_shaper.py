"""A slow line's decisions, under a clock of the test's own."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.shaper import Pipe, Shaper
from codec.errors import UsageError

RATES = [1, 10, 100, 1000]


def test_bytes_leave_at_the_rate_and_arrive_half_a_round_trip_later() -> None:
    shaper = Shaper(rtt_ms=50, mbit=8)
    assert shaper.passage(1000, now=5.0, busy_until=-math.inf) == pytest.approx((5.001, 5.026))
    assert shaper.passage(1000, now=5.0, busy_until=7.0) == pytest.approx((7.001, 7.026))


def test_zero_is_no_limit_and_no_delay() -> None:
    assert Shaper().passage(1 << 30, now=3.0, busy_until=1.0) == (3.0, 3.0)


@pytest.mark.parametrize("mbit", [*RATES, 0])
def test_a_small_message_waits_for_no_more_than_itself(mbit: float) -> None:
    shaper = Shaper(mbit=mbit)
    pipe = Pipe(shaper)
    pipe.put(b"x" * 100, 1.0)
    assert pipe.due == 1.0 + 100 / shaper.rate
    assert shaper.chunk / shaper.rate <= max(0.003, 1500 / shaper.rate)


@pytest.mark.parametrize("rtt_ms", [0, 50])
@pytest.mark.parametrize("mbit", RATES)
def test_the_rate_holds_though_every_wake_up_is_late(mbit: float, rtt_ms: float) -> None:
    shaper, chance = Shaper(rtt_ms, mbit), random.Random(mbit)
    pipe, now, arrived, most = Pipe(shaper), 0.0, 0, 0
    while now < 4.0:
        while pieces := pipe.arrived(now):
            pipe.written(sum(map(len, pieces)))
            arrived += sum(map(len, pieces))
        while room := pipe.room:
            pipe.put(bytes(room), now)
        most = max(most, pipe._held)
        assert pipe.due is not None
        now = max(now, pipe.due) + chance.uniform(0, 0.01)
    assert arrived / (now - shaper.delay) == pytest.approx(shaper.rate, rel=0.02)
    assert most <= shaper.limit <= shaper.rate * (rtt_ms / 2000 + 0.02) + (128 << 10)


@given(st.lists(st.tuples(st.binary(max_size=9000), st.floats(0, 0.1), st.integers(1, 5000)), max_size=20))
def test_a_pipe_keeps_every_byte_in_order_however_little_is_written(
    moves: list[tuple[bytes, float, int]],
) -> None:
    pipe, now, sent, got = Pipe(Shaper(rtt_ms=20, mbit=10)), 0.0, b"", b""
    for data, wait, most in moves:
        now += wait
        pipe.put(data, now)
        sent += data
        taken = b"".join(pipe.arrived(now))[:most]
        pipe.written(len(taken))
        got += taken
    pipe.end("close", now)
    while (due := pipe.due) is not None:
        assert pipe.take_ending(math.nextafter(due, -1)) is None
        taken = b"".join(pipe.arrived(due))
        pipe.written(len(taken))
        got += taken
        if pipe.take_ending(due) == "close":
            break
    assert got == sent
    assert (pipe.due, pipe.room) == (None, 0)


def test_a_reset_follows_a_close_and_what_is_dropped_never_comes() -> None:
    pipe = Pipe(Shaper(rtt_ms=20))
    pipe.put(b"last words", 0.0)
    pipe.end("close", 0.0)
    pipe.end("reset", 1.0)
    assert pipe.take_ending(2.0) is None  # The words come first.
    pipe.written(10)
    assert (pipe.due, pipe.take_ending(1.0), pipe.take_ending(1.01)) == (1.01, None, "reset")
    pipe.put(b"more", 2.0)
    pipe.drop()
    assert (pipe.due, pipe.arrived(9.0), pipe.room) == (None, [], 0)


@pytest.mark.parametrize("values", [(-1, 0), (math.nan, 0), (0, -1), (0, math.inf), (0, math.nan), (1e9, 0)])
def test_what_is_no_line_is_refused(values: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="is not between 0"):
        Shaper(*values)
