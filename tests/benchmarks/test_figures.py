"""Percentiles, fairness and rates, beside numpy's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.figures import growth, jain, latencies_ms, percentile

pytestmark = pytest.mark.timeout(60)

_NUMBERS = st.floats(0, 1e6, allow_nan=False)


@given(st.lists(_NUMBERS, min_size=1), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-9)


def test_latencies_are_told_in_milliseconds_of_kinds_that_occurred() -> None:
    found = latencies_ms({"forward": [0.001, 0.002, 0.003], "commit": []})
    assert found == {
        "forward": {"count": 3, "p50": pytest.approx(2.0), "p99": pytest.approx(2.98)},
    }


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=50), st.floats(0.1, 10))
def test_fairness_is_between_one_nth_and_one_whatever_the_unit(shares: list[float], unit: float) -> None:
    fairness = jain(shares)
    assert 1 / len(shares) - 1e-9 <= fairness <= 1 + 1e-9
    assert jain([share * unit for share in shares]) == pytest.approx(fairness)


def test_fairness_of_equals_of_one_who_has_all_and_of_nothing() -> None:
    assert jain([7.0] * 9) == pytest.approx(1.0)
    assert jain([0.0, 0.0, 5.0, 0.0]) == pytest.approx(0.25)
    assert jain([1.0, 2.0, 3.0]) == pytest.approx(36 / 42)
    assert jain([0.0, 0.0]) == 0.0


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=20), st.floats(-1, 20), st.floats(0.1, 5))
def test_growth_is_between_samples_on_straight_lines(
    steps: list[float], begin: float, seconds: float
) -> None:
    at, value = np.cumsum(steps), np.cumsum(np.square(steps))
    samples = list(zip(at.tolist(), value.tolist(), strict=True))
    expected = (np.interp(begin + seconds, at, value) - np.interp(begin, at, value)) / seconds
    assert growth(samples, begin, begin + seconds) == pytest.approx(expected, abs=1e-9)
