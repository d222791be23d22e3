"""What a benchmark makes of its numbers: percentiles, fairness, shares of time. Pure."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence

Sample = tuple[float, float]
"""A moment in seconds, and what a counter that only grows stood at."""


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of 100 are not above, between neighbours if need be. Needs one value."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def latencies_ms(waits: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Of each kind of request the round trips' median and 99th percentile, from seconds."""
    return {
        kind: {
            "count": len(seconds),
            "p50": percentile(seconds, 50) * 1e3,
            "p99": percentile(seconds, 99) * 1e3,
        }
        for kind, seconds in sorted(waits.items())
        if seconds
    }


def jain(shares: Sequence[float]) -> float:
    """Jain's fairness index: 1 if all got the same, 1/n if one got everything, 0 if nobody got any."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 0.0


def growth(samples: Sequence[Sample], begin: float, end: float) -> float:
    """By how much a counter grew per second between two moments, on straight lines between samples.

    Before the first sample and after the last one it stands still.
    """
    return (_at(samples, end) - _at(samples, begin)) / (end - begin)


def _at(samples: Sequence[Sample], moment: float) -> float:
    after = bisect_right(samples, moment, key=lambda sample: sample[0])
    if after == 0:
        return samples[0][1]
    if after == len(samples):
        return samples[-1][1]
    (t0, v0), (t1, v1) = samples[after - 1], samples[after]
    return v0 + (v1 - v0) * (moment - t0) / (t1 - t0)
