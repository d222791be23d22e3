"""The ladder from the published way to ours: one switch at a time."""

from dataclasses import asdict
from itertools import pairwise

import pytest

from benchmarks.ways import R0, R1, compared, generation_ways, training_ways

pytestmark = pytest.mark.timeout(60)


def test_each_rung_switches_one_thing_on_and_ends_at_ours() -> None:
    training = training_ways(silos=4, accumulate=8, window=3, wire="steps")
    generation = generation_ways(silos=8, wire="steps")
    for ways in (training, generation):
        for before, after in pairwise(ways):
            changed = {
                name
                for name, value in asdict(after).items()
                if name not in ("name", "label") and value != asdict(before)[name]
            }
            assert len(changed) == 1, after.name
        assert [way.label for way in ways if way.label] == [R0, R1]
    ours, decoding = training[-1], generation[-1]
    assert (ours.masked, ours.padded, ours.accumulate, ours.window, ours.silos) == (False, False, 8, 3, 4)
    assert (decoding.cached, decoding.masked, decoding.trips, decoding.silos) == (True, False, 1, 8)
    published = next(way for way in generation if way.label == R1)
    assert (published.cached, published.masked, published.padded) == (True, False, True)
    assert (published.trips, published.silos, published.wire) == (2, 1, "raw")


def test_gains_multiply_to_the_whole() -> None:
    rates = {R0: 2.0, "between": 3.0, R1: 6.0, "ours": 60.0}
    labels = {R0, R1}
    rows = [{"label": k if k in labels else "", "tokens_per_s": v} for k, v in rates.items()]
    found = compared(rows)
    assert [row["gain"] for row in found["rows"]] == pytest.approx([1.0, 1.5, 2.0, 10.0])
    assert (found["times_r0"], found["times_r1"]) == pytest.approx((30.0, 10.0))
