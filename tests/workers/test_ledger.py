"""Who may commit what, and what happens to a step when a silo leaves. No tensors."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec.errors import (
    EndedError,
    LimitError,
    MismatchError,
    ProtocolError,
    TrunklineError,
    UnavailableError,
    UnknownNameError,
)
from codec.messages import Commit
from codec.plan import LoraPlan, RunPlan
from workers.ledger import Ledger

NORTH, SOUTH, EAST = b"north", b"south", b"east"


def commit(number: int = 1, *, step: int = 0, **fields: Any) -> Commit:
    return Commit(id=number, run="r", step=step, **{"loss_tokens": 10, "square_norm": 4.0, **fields})


def joined(*silos: bytes, **plan: Any) -> Ledger:
    ledger = Ledger(RunPlan(**{"silos": len(silos), **plan}))
    for silo in silos:
        ledger.join(silo, ledger.plan)
    return ledger


def raises(kind: type[TrunklineError], words: str, act: Callable[[], object]) -> TrunklineError:
    with pytest.raises(kind, match=words) as caught:
        act()
    return caught.value


@pytest.mark.parametrize(
    "changed",
    [{"silos": 3}, {"steps": 11}, {"ends": "shared"}, {"lora": LoraPlan(rank=4)}, {"seed": 1}, {"eps": 1e-7}],
)
def test_every_silo_brings_the_same_plan(changed: dict[str, Any]) -> None:
    ledger = joined(NORTH, silos=2)
    plan = msgspec.structs.replace(ledger.plan, **changed)
    error = raises(MismatchError, "other settings", lambda: ledger.join(SOUTH, plan))
    assert error.at == "silo"
    assert "--run" in error.hint
    assert ledger.members == {NORTH}


def test_a_full_run_takes_nobody_more_and_its_own_again() -> None:
    ledger = joined(NORTH, SOUTH)
    error = raises(LimitError, "for 2 silos", lambda: ledger.join(EAST, ledger.plan))
    assert error.at == "silo"
    ledger.join(NORTH, ledger.plan)
    assert ledger.members == {NORTH, SOUTH}


def test_the_last_commit_completes_the_step() -> None:
    ledger = joined(NORTH, SOUTH)
    assert not ledger.commit(NORTH, commit(1, loss_tokens=10, square_norm=4.0))
    assert ledger.commit(SOUTH, commit(2, loss_tokens=5, square_norm=0.5))
    assert ledger.totals() == (15, 4.5)
    assert {silo: c.id for silo, c in ledger.commits.items()} == {NORTH: 1, SOUTH: 2}
    ledger.stepped()
    assert (ledger.step, ledger.commits) == (1, {})
    assert not ledger.commit(SOUTH, commit(3, step=1))


def test_a_step_waits_for_silos_that_have_not_joined_yet() -> None:
    ledger = joined(NORTH, silos=2)
    assert not ledger.commit(NORTH, commit())
    ledger.join(SOUTH, ledger.plan)
    assert ledger.commit(SOUTH, commit())


@pytest.mark.parametrize("step", [0, 2, 99])
def test_a_commit_is_of_the_step_the_run_is_at(step: int) -> None:
    ledger = joined(NORTH)
    ledger.commit(NORTH, commit())
    ledger.stepped()
    error = raises(
        ProtocolError,
        f"at step 1, the commit is of step {step}",
        lambda: ledger.commit(NORTH, commit(step=step)),
    )
    assert error.at == "silo"
    assert ledger.commits == {}


def test_a_silo_commits_a_step_once_and_the_same_again_changes_nothing() -> None:
    ledger = joined(NORTH, SOUTH)
    ledger.commit(NORTH, commit(1, loss_tokens=10))
    raises(
        ProtocolError,
        "committed by this silo already",
        lambda: ledger.commit(NORTH, commit(2, loss_tokens=99)),
    )
    assert not ledger.commit(NORTH, commit(4, loss_tokens=10))
    assert ledger.commits[NORTH].id == 4
    assert ledger.commit(SOUTH, commit(3, loss_tokens=1))
    assert ledger.totals()[0] == 11


def test_a_stranger_commits_nothing() -> None:
    ledger = joined(NORTH, silos=2)
    raises(UnknownNameError, "not in this run", lambda: ledger.commit(SOUTH, commit()))
    raises(UnknownNameError, "not in this run", lambda: ledger.check(SOUTH))


def test_shared_ends_have_the_same_names_at_every_silo() -> None:
    ledger = joined(NORTH, SOUTH, ends="shared")
    ledger.commit(NORTH, commit(names=("a", "b")))
    for names in ((), ("a",), ("b", "a"), ("a", "b", "c")):
        error = raises(
            MismatchError, "same partition", lambda names=names: ledger.commit(SOUTH, commit(names=names))
        )
        assert "--ends own" in error.hint
    assert ledger.commit(SOUTH, commit(names=("a", "b")))


def test_own_ends_do_not_cross() -> None:
    ledger = joined(NORTH, ends="own")
    raises(ProtocolError, "--ends shared", lambda: ledger.commit(NORTH, commit(names=("a",))))
    assert ledger.commit(NORTH, commit())


def test_a_silo_that_leaves_mid_step_ends_the_run_for_those_who_wait() -> None:
    ledger = joined(NORTH, SOUTH, EAST)
    ledger.commit(NORTH, commit(7))
    ledger.commit(SOUTH, commit(8))
    vain = ledger.leave(EAST, "silo 'east'")
    assert {silo: c.id for silo, c in vain.items()} == {NORTH: 7, SOUTH: 8}
    assert ledger.commits == {}
    for act in (lambda: ledger.check(NORTH), lambda: ledger.commit(NORTH, commit())):
        error = raises(EndedError, "silo 'east' left the run at step 0", act)
        assert error.at == "silo"
        assert "--resume" in error.hint


def test_the_first_to_leave_is_named() -> None:
    ledger = joined(NORTH, SOUTH, EAST)
    ledger.leave(EAST, "silo 'east'")
    assert ledger.leave(SOUTH, "silo 'south'") == {}
    raises(EndedError, "'east'", lambda: ledger.check(NORTH))


def test_nobody_joins_a_run_that_cannot_go_on() -> None:
    """Started again, a silo waits until the others have left too, and the run is opened anew."""
    ledger = joined(NORTH, SOUTH)
    ledger.leave(SOUTH, "silo 'south'")
    raises(UnavailableError, "'south' left", lambda: ledger.join(SOUTH, ledger.plan))
    assert ledger.members == {NORTH}


def test_after_the_last_step_silos_leave_one_by_one() -> None:
    ledger = joined(NORTH, SOUTH, steps=1)
    for silo in (NORTH, SOUTH):
        ledger.commit(silo, commit())
    ledger.stepped()
    assert ledger.leave(NORTH, "another silo") == {}
    ledger.check(SOUTH)


@given(st.lists(st.tuples(st.sampled_from([NORTH, SOUTH, EAST]), st.integers(0, 3)), max_size=30))
def test_a_step_is_taken_only_with_one_commit_of_every_silo(tries: list[tuple[bytes, int]]) -> None:
    ledger, accepted = joined(NORTH, SOUTH, EAST), set()
    for silo, step in tries:
        try:
            complete = ledger.commit(silo, commit(step=step))
        except ProtocolError:
            assert step != ledger.step
            continue
        accepted.add(silo)
        assert complete == (accepted == {NORTH, SOUTH, EAST})
        if complete:
            ledger.stepped()
            accepted.clear()
