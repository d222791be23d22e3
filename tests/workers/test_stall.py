"""When a pass counts as stuck. What follows is in tests/integration/test_worker_stopped.py."""

import pytest
import torch

from workers.busy import Busy
from workers.stall import Stall


def looks(stall: Stall, busy: Busy, upto: int = 1000) -> int | None:
    """After how many seconds the pass under way is found stuck."""
    return next((seconds for seconds in range(upto) if stall.stuck(busy, 1.0)), None)


@pytest.fixture
def busy() -> Busy:
    return Busy(torch.device("cpu"))


def test_nothing_under_way_is_never_stuck(busy: Busy) -> None:
    assert looks(Stall(120.0), busy) is None


def test_what_was_never_measured_has_all_the_time_there_is(busy: Busy) -> None:
    with busy.counting("prefill", 4096):
        assert looks(Stall(120.0), busy) == pytest.approx(120, abs=2)


@pytest.mark.parametrize(
    ("tokens", "limit"), [(1, Stall.LEAST), (400, 40.0), (4000, 120.0)], ids=["short", "long", "very long"]
)
def test_passes_like_it_tell_how_long_it_may_take(busy: Busy, tokens: int, limit: float) -> None:
    busy.slowest["prefill"] = 0.01
    with busy.counting("prefill", tokens):
        assert looks(Stall(120.0), busy) == pytest.approx(limit, abs=2)


def test_what_has_no_tokens_is_not_measured_by_others(busy: Busy) -> None:
    """To store a run's state may take far longer than to open a session."""
    with busy.counting("alone", 0):
        pass
    with busy.counting("alone", 0):
        assert looks(Stall(60.0), busy) == pytest.approx(60, abs=2)


def test_many_passes_are_not_one_long_one(busy: Busy) -> None:
    stall = Stall(5.0)
    for _ in range(100):
        with busy.counting("decode", 1):
            assert not stall.stuck(busy, 4.0)


def test_the_slowest_of_each_kind_is_kept(busy: Busy, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 10.0, 11.0])
    monkeypatch.setattr("workers.busy.time.monotonic", lambda: next(clock))
    for tokens in (4, 1):
        with busy.counting("decode", tokens):
            pass
    assert busy.slowest == {"decode": 1.0}
