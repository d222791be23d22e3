"""The account of what hidden states spend: against the formula, the library's other way, and what is sent."""

import math
import sys
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from broker.parcel import Parcel
from codec.errors import UsageError
from codec.messages import Backward, Forward
from codec.plan import LoraPlan, RunPlan
from codec.tensors import decode_tensors
from silo_agent.accountant import Wish, check_accountable, epsilon_of, exposures, sigma_for
from silo_agent.microbatch import Example, MicroBatch, pack_examples
from silo_agent.noise import Noise, NoiseScale, clipped

Steps = list[list[MicroBatch]]
PHI = NormalDist().cdf


def example(*ids: int) -> Example:
    return Example(ids, (True,) * len(ids))


@pytest.mark.parametrize(("clip", "sigma"), [(1.0, 2.0), (1.0, 1.0), (3.0, 8.0), (0.5, 10.0)])
def test_one_vector_is_the_gaussian_mechanism_of_twice_the_clip(clip: float, sigma: float) -> None:
    """Balle and Wang 2018, theorem 8, by the standard library."""
    delta = 1e-5
    epsilon = epsilon_of(NoiseScale(absolute=sigma, clip=clip), 1, delta)
    ratio = 2 * clip / sigma
    reached = PHI(ratio / 2 - epsilon / ratio) - math.exp(epsilon) * PHI(-ratio / 2 - epsilon / ratio)
    assert reached == pytest.approx(delta, rel=1e-4)


@pytest.mark.parametrize(("tokens", "times"), [(1, 1), (80, 1), (80, 3), (7, 30)])
def test_many_vectors_are_as_many_composed_releases(tokens: int, times: int) -> None:
    """The same by numerical composition, vector by vector, of the library's other accountant."""
    clip, sigma, delta = 1.0, 40.0, 1e-5
    one = dp_accounting.GaussianDpEvent(sigma / (2 * clip))
    by_vector = PLDAccountant().compose(dp_accounting.SelfComposedDpEvent(one, tokens * times))
    one = dp_accounting.GaussianDpEvent(sigma / (2 * clip * math.sqrt(tokens)))
    by_release = PLDAccountant()
    for _ in range(times):
        by_release.compose(one)
    found = epsilon_of(NoiseScale(absolute=sigma, clip=clip), tokens * times, delta)
    for other in (by_vector, by_release):
        assert other.get_epsilon(delta) == pytest.approx(found, rel=1e-2, abs=1e-3)


@given(
    clip=st.floats(1e-3, 1e3),
    vectors=st.integers(1, 10**6),
    epsilon=st.floats(1e-2, 1e4),
    delta=st.floats(1e-12, 1e-2),
)
def test_the_noise_for_an_epsilon_spends_it_and_no_more(
    clip: float, vectors: int, epsilon: float, delta: float
) -> None:
    scale = NoiseScale(absolute=sigma_for(clip, vectors, epsilon, delta), clip=clip)
    spent = epsilon_of(scale, vectors, delta)
    assert spent <= epsilon
    assert spent == pytest.approx(epsilon, rel=1e-5, abs=1e-6)


VECTORS = st.lists(st.lists(st.floats(-1e3, 1e3), min_size=5, max_size=5), min_size=1, max_size=6)


@given(rows=VECTORS, bound=st.floats(1e-2, 1e4), along=st.integers(0, 2**32))
def test_a_clipped_vector_keeps_its_direction_and_its_gradient_is_the_exact_one(
    rows: list[list[float]], bound: float, along: int
) -> None:
    hidden = torch.tensor(rows, dtype=torch.float32, requires_grad=True)
    found = clipped(hidden, bound)
    gradient = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(along))
    found.backward(gradient)
    assert hidden.grad is not None
    for vector, short, g, came in zip(
        hidden.detach().double(), found.detach().double(), gradient.double(), hidden.grad, strict=True
    ):
        norm = float(vector.norm())
        assert float(short.norm()) <= bound * (1 + 1e-6)
        if norm <= bound * (1 - 1e-6):
            assert torch.equal(short, vector)
            assert torch.equal(came.double(), g)
        elif norm > bound * (1 + 1e-6):
            unit = vector / norm
            assert torch.allclose(short, unit * bound, rtol=1e-5, atol=1e-5 * bound)
            expected = (g - unit * (unit @ g)) * bound / norm
            assert torch.allclose(came.double(), expected, rtol=1e-3, atol=1e-4 * bound / norm)


def test_noise_goes_on_top_of_what_was_clipped() -> None:
    hidden = torch.full((200, 64), 100.0)
    alone = Noise(NoiseScale(clip=8.0)).add(hidden)
    assert torch.allclose(alone, torch.ones(200, 64))
    added = Noise(NoiseScale(absolute=0.5, clip=8.0)).add(hidden) - alone
    assert float(added.std()) == pytest.approx(0.5, rel=0.05)
    in_bf16 = Noise(NoiseScale(absolute=0.5, clip=8.0)).add(hidden.bfloat16())
    assert in_bf16.dtype == torch.bfloat16
    relative = Noise(NoiseScale(relative=1.0, clip=8.0))
    relative.add(torch.cat([hidden, -hidden]))
    assert relative.step == pytest.approx(1.0)  # Measured on what is sent, which is 1 or -1 by now.


@given(
    st.lists(
        st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=5), min_size=1, max_size=3),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
)
def test_the_worst_sequence_is_counted(steps: list[list[list[int]]], trains_head: bool) -> None:
    found = exposures(
        ([pack_examples([example(*ids)]) for ids in step] for step in steps), trains_head=trains_head
    )
    for until in range(1, len(steps) + 1):
        done, worst = steps[:until], 0
        for text in (ids for step in done for ids in step):
            first = next(at for at, step in enumerate(done) if text in step)
            worst = max(
                worst,
                sum(
                    len(ids)
                    for at, step in enumerate(done)
                    for ids in step
                    if ids == text or (trains_head and at > first)
                ),
            )
        assert found[until - 1] == worst


def sent_at_the_head(new_pool: Callable[[], Any], steps: Steps, freeze_head: bool) -> list[Tensor]:
    """The exact vectors of a run without noise, `[tokens, hidden]` of each micro-batch."""
    plan = RunPlan(steps=len(steps), learning_rate=1e-2, lora=LoraPlan(rank=2))
    with new_pool() as pool:
        pool.start_worker()
        trainer = pool.trainer(plan, freeze_head=freeze_head)
        first = {name: tensor.detach().clone() for name, tensor in trainer._ends.head_adapter().items()}
        for step in steps:
            trainer.step(step)
        last = trainer._ends.head_adapter()
        assert all(torch.equal(last[name], first[name]) for name in first) == freeze_head
        assert all(p.header.wants_gradient != freeze_head for p in pool.sent(Backward))
        parcels: list[Parcel] = pool.sent(Forward)
        return [decode_tensors(p.header.tensors, p.buffers(), boundary="test")[0] for p in parcels]


@pytest.mark.parametrize("freeze_head", [True, False])
def test_no_more_vectors_move_than_are_counted(new_pool: Callable[[], Any], freeze_head: bool) -> None:
    """A neighbour: the worst sequence from its first token on another one. Only a head that is not trained
    keeps that to its own vectors."""
    others = [example(*range(20, 26)), example(*range(40, 45)), example(*range(50, 54))]

    def run_of(mine: Example) -> Steps:
        return [
            [pack_examples([mine, others[0]])],
            [pack_examples(others[1:])],
            [pack_examples([mine]), pack_examples([others[0]])],
        ]

    mine, neighbour = example(*range(100, 109)), example(*range(200, 209))
    (counted,) = exposures(run_of(mine), trains_head=not freeze_head)[-1:]
    here, there = (
        sent_at_the_head(new_pool, run_of(sequence), freeze_head) for sequence in (mine, neighbour)
    )
    moved = sum(int((~torch.isclose(a, b, atol=1e-6).all(1)).sum()) for a, b in zip(here, there, strict=True))
    assert moved == counted == (18 if freeze_head else 9 + 9 + 15)


def steps_of(number: int) -> Steps:
    return [[pack_examples([example(*range(3, 13))])] for _ in range(number)]


def test_a_budget_is_how_many_steps_stay_within_it() -> None:
    scale = NoiseScale(absolute=30.0, clip=1.0)
    account = Wish(1e-5).account(scale, None, steps_of(6), trains_head=False)
    assert account is not None
    spent = [epsilon_of(scale, 10 * done, 1e-5) for done in range(1, 7)]
    assert [account.epsilon(done) for done in range(7)] == [0.0, *spent]
    for done, epsilon in enumerate(spent, 1):
        assert Wish(1e-5, budget=epsilon).last_step(account) == done
        assert Wish(1e-5, budget=epsilon * (1 - 1e-9)).last_step(account) == done - 1
    assert Wish(1e-5, budget=1e9).last_step(account) == Wish(1e-5).last_step(account) == 6


def test_an_epsilon_is_spent_by_the_last_of_the_planned_steps() -> None:
    wish = Wish(1e-5, epsilon=8.0, budget=8.0)
    account = wish.account(NoiseScale(clip=2.0), None, steps_of(5), trains_head=False)
    assert account is not None
    assert account.epsilon(5) == pytest.approx(8.0)
    assert account.epsilon(4) < 8.0
    assert wish.last_step(account) == 5
    assert account.report(5) == {
        "epsilon": account.epsilon(5),
        "delta": 1e-5,
        "clip": 2.0,
        "sigma": account.scale.absolute,
        "vectors": 50,
    }
    assert Wish(None).account(NoiseScale(), None, steps_of(1), trains_head=False) is None


@pytest.mark.parametrize(
    ("scale", "wish", "seed", "why"),
    [
        (NoiseScale(absolute=1.0), Wish(1e-5), None, "without --noise-clip"),
        (NoiseScale(relative=1.0, clip=1.0), Wish(1e-5), None, "measured on the data"),
        (NoiseScale(relative=1.0, clip=1.0), Wish(1e-5, epsilon=1.0), None, "measured on the data"),
        (NoiseScale(clip=1.0), Wish(1e-5), None, "without noise no epsilon is finite"),
        (NoiseScale(absolute=1.0, clip=1.0), Wish(1e-5, epsilon=1.0), None, "chooses the noise itself"),
        (NoiseScale(absolute=1.0, clip=1.0), Wish(1e-5), 3, "--noise-seed"),
        (NoiseScale(absolute=1.0, clip=1.0), Wish(0.0), None, "between 0 and 1"),
        (NoiseScale(absolute=1.0, clip=1.0), Wish(1e-5, budget=-1.0), None, "above 0"),
        (NoiseScale(absolute=1.0, clip=1.0), Wish(None, budget=1.0), None, "need --delta"),
        (NoiseScale(absolute=1.0, clip=1.0), Wish(1e-5, budget=1.0), None, "the first step alone spends ε"),
    ],
)
def test_what_no_account_can_be_given_of(scale: NoiseScale, wish: Wish, seed: int | None, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        wish.account(scale, seed, steps_of(3), trains_head=False)


def test_without_the_library_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UsageError, match=r"dp-accounting.*trunkline\[dp\]"):
        check_accountable(NoiseScale(absolute=1.0, clip=1.0), None, 1e-5)
