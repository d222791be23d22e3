"""What the data asks of a silo, against what quantiles are and against the micro-batches themselves."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec.errors import DataError
from silo_agent.microbatch import Example, batches
from silo_agent.planning.work import generating_work, lengths_of, spread, training_work


@st.composite
def data(draw: st.DrawFn) -> list[Example]:
    marks = draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=30))
    return [Example((7,) * (len(m) + 1), (False, *m[:-1], True)) for m in marks]


@given(data(), st.integers(1, 50))
def test_figures_of_the_data(examples: list[Example], a_step: int) -> None:
    found = lengths_of(examples, a_step)
    sizes = [len(example.ids) for example in examples]
    assert (found.examples, found.most) == (len(sizes), max(sizes))
    for share, length in ((0.5, found.median), (0.95, found.p95)):
        assert length in sizes
        assert sum(size <= length for size in sizes) >= share * len(sizes)
        assert sum(size >= length for size in sizes) >= (1 - share) * len(sizes) - 1e-9
    assert found.learned == pytest.approx(sum(sum(e.answer[1:]) for e in examples) / sum(sizes))
    assert (found.steps - 1) * a_step < len(sizes) <= found.steps * a_step


@given(data(), st.integers(1, 6), st.integers(0, 3))
def test_no_micro_batch_is_larger_than_the_largest(examples: list[Example], batch: int, seed: int) -> None:
    examples = examples * batch  # So that none begins in one shuffle and ends in the next.
    work = training_work(examples, batch=batch, accumulate=2)
    for made in islice(batches(examples, batch, seed), len(examples) // batch):
        assert len(made.ids) <= work.most
        assert len(made.keep) <= work.most_predicted


@given(data(), st.integers(1, 8))
def test_a_typical_micro_batch_is_made_of_the_datas_lengths(examples: list[Example], batch: int) -> None:
    work = training_work(examples, batch=batch, accumulate=4, window=2)
    assert len(work.lengths) == batch
    assert set(work.lengths) <= {len(example.ids) for example in examples}
    assert 1 <= work.predicted <= work.tokens <= work.most or len(examples) < batch
    assert work.flights == 2


def test_what_is_in_flight_is_bounded_by_the_step() -> None:
    examples = [Example((1, 2), (False, True))]
    assert training_work(examples, batch=1, accumulate=1).flights == 1
    assert training_work(examples, batch=1, accumulate=99).flights == 4


def test_lengths_are_spread_evenly() -> None:
    assert spread(list(range(100)), 4) == (12, 37, 62, 87)
    assert spread([5], 3) == (5, 5, 5)


def test_a_session_may_be_filled_at_once() -> None:
    work = generating_work(4, 100, scored=70)
    assert (work.tokens, work.most, work.cached, work.most_predicted) == (4, 400, 400, 70)
    assert generating_work(4, 100).most_predicted == 4


def test_there_must_be_data() -> None:
    with pytest.raises(DataError, match="no example"):
        lengths_of([], 8)
