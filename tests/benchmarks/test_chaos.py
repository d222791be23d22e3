"""The chaos benchmark's plan and its counting; that it runs is `tests/integration/test_chaos.py`'s affair."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.chaos_plan import BROKER, SILOS, TRAINER, Disturbance, plan, worker_name
from benchmarks.chaos_tally import AFTER_S, Deed, Wait, by_kind, recoveries, summary, unexplained

seeds = st.integers(0, 2**63)


@given(
    seed=seeds,
    seconds=st.floats(1, 300),
    every=st.floats(0.5, 5),
    workers=st.integers(2, 5),
    trainer=st.booleans(),
)
def test_a_plan_follows_from_its_seed_alone(
    seed: int, seconds: float, every: float, workers: int, trainer: bool
) -> None:
    options = {"every": every, "workers": workers, "trainer": trainer}
    found = plan(seed, seconds, **options)
    assert found == plan(seed, seconds, **options)
    assert all(one.at <= other.at for one, other in pairwise(found))
    assert all(0 < each.at < seconds for each in found)
    targets = {BROKER, SILOS, *map(worker_name, range(workers)), *([TRAINER] if trainer else [])}
    for each in found:
        assert each.target in targets
        assert 0 <= each.seconds <= 3
        assert each.kind != "pause" or each.seconds >= 1
    longer = plan(seed, 2 * seconds, **options)
    assert longer[: len(found)] == found


def test_another_seed_is_another_plan_and_ten_minutes_hold_a_hundred_kills() -> None:
    plans = [plan(seed, 600, every=2.5, workers=3, trainer=False) for seed in range(20)]
    assert len({tuple(found) for found in plans}) == 20
    for found in plans:
        assert sum(each.kind == "kill" for each in found) > 120  # Some are left out.
        assert {each.kind for each in found} == {"kill", "pause", "drain", "cut"}


def deed(begun: float, ended: float, kind: str = "kill", target: str = "worker-1") -> Deed:
    return Deed(Disturbance(begun, kind, target, ended - begun), begun, ended)  # type: ignore[arg-type]


def test_a_recovery_is_from_the_disturbance_to_the_answer() -> None:
    (found,) = recoveries([Wait(9.9, 12.5)], [deed(10.0, 10.5)])
    assert (found.at, found.seconds, found.label) == (10.0, 2.5, "kill worker")


def test_a_wait_that_begins_later_is_counted_from_its_beginning() -> None:
    (found,) = recoveries([Wait(11.0, 12.5)], [deed(10.0, 10.5)])
    assert (found.at, found.seconds) == (11.0, 1.5)


def test_the_first_of_several_disturbances_counts() -> None:
    """What hits while a request recovers makes it longer, and does not begin it anew."""
    (found,) = recoveries([Wait(9.0, 16.0)], [deed(12.0, 13.0, target=BROKER), deed(10.0, 11.0)])
    assert (found.seconds, found.label) == (6.0, "kill worker")


@pytest.mark.parametrize(
    ("wait", "why"),
    [
        (Wait(9.9, 10.1), "it was no longer than any"),
        (Wait(8.0, 9.0), "it was over"),
        (Wait(10.5 + AFTER_S + 0.1, 20.0), "it was over long before"),
    ],
)
def test_what_is_no_recovery(wait: Wait, why: str) -> None:
    assert recoveries([wait], [deed(10.0, 10.5)]) == [], why


def test_a_stall_that_nothing_explains_is_told() -> None:
    waits = [Wait(0.0, 1.0), Wait(9.9, 11.0), Wait(20.0, 22.0), Wait(30.0, 30.1)]
    assert unexplained(waits, [deed(10.0, 10.5)]) == {"count": 2, "max_s": 2.0}


def test_figures_by_kind() -> None:
    deeds = [deed(10.0, 10.5), deed(20.0, 20.5, "cut", SILOS)]
    found = recoveries([Wait(9.9, 11.0), Wait(9.9, 12.0), Wait(19.9, 20.5)], deeds)
    assert {label: figures["count"] for label, figures in by_kind(found).items()} == {
        "cut silos": 1,
        "kill worker": 2,
    }
    assert summary(found) == {"count": 3, "p50_s": 1.0, "p99_s": pytest.approx(1.98), "max_s": 2.0}
    assert summary([])["p99_s"] is None
