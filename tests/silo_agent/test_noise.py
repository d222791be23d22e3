"""The noise itself: how strong, how fresh, from where, and measured against what."""

import json
import math
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from codec.errors import UsageError
from silo_agent.noise import Noise, NoiseScale, repeatable, system_normal

HIDDEN = 3 + 2 * torch.randn(400, 1024, generator=torch.Generator().manual_seed(0))
"""A boundary of mean 3 and standard deviation 2: a sigma in units of anything else would show."""
STD = float(HIDDEN.double().std(correction=0))
N = HIDDEN.numel()


@pytest.mark.parametrize(
    ("scale", "sigma"),
    [
        (NoiseScale(relative=0.1), 0.1 * STD),
        (NoiseScale(absolute=0.3), 0.3),
        (NoiseScale(mean_abs=0.2), 0.2 * math.sqrt(math.pi / 2)),
    ],
)
def test_what_is_added_is_gaussian_of_the_strength_asked_for(scale: NoiseScale, sigma: float) -> None:
    added = (Noise(scale).add(HIDDEN) - HIDDEN).double()
    # Five standard errors of each estimate: once in a million runs by chance.
    assert float(added.mean()) == pytest.approx(0, abs=5 * sigma / math.sqrt(N))
    assert float(added.std()) == pytest.approx(sigma, rel=5 / math.sqrt(2 * N))
    assert float((added**4).mean()) / sigma**4 == pytest.approx(3, abs=5 * math.sqrt(96 / N))
    beyond = float((added.abs() > 2 * sigma).double().mean())
    assert beyond == pytest.approx(0.0455, abs=5 * math.sqrt(0.0455 / N))
    if scale.mean_abs:
        assert float(added.abs().mean()) == pytest.approx(scale.mean_abs, rel=5 / math.sqrt(N))


@pytest.mark.parametrize("shift", [1, 1024, N // 2])
def test_its_elements_do_not_depend_on_each_other(shift: int) -> None:
    normal = system_normal(HIDDEN.shape, HIDDEN.device).reshape(-1).double()
    for values in (normal, normal.abs(), normal**2):
        centred = values - values.mean()
        correlation = (centred[:-shift] * centred[shift:]).mean() / centred.square().mean()
        assert abs(float(correlation)) < 5 / math.sqrt(N - shift)


@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 5), (1, 64)])
def test_every_shape_is_filled(shape: tuple[int, int]) -> None:
    drawn = system_normal(torch.Size(shape), torch.device("cpu"))
    assert drawn.shape == shape
    assert drawn.dtype == torch.float32
    assert bool(drawn.isfinite().all())
    assert drawn.unique().numel() == drawn.numel()


def test_every_call_adds_other_noise() -> None:
    noise = Noise(NoiseScale(absolute=1.0))
    first, second = (noise.add(torch.zeros(50, 64)) for _ in range(2))
    assert not bool((first == second).any())


def test_no_other_process_repeats_it_whatever_its_global_seeds(repository: Path) -> None:
    program = (
        "import json, random, torch; random.seed(0); torch.manual_seed(0)\n"
        "from silo_agent.noise import Noise, NoiseScale\n"
        "print(json.dumps(Noise(NoiseScale(absolute=1.0)).add(torch.zeros(4, 8)).tolist()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=True
    )
    there = torch.tensor(json.loads(done.stdout))
    random.seed(0)
    torch.manual_seed(0)
    here = Noise(NoiseScale(absolute=1.0)).add(torch.zeros(4, 8))
    assert there.shape == here.shape
    assert not bool((there == here).any())


def test_each_element_takes_four_random_bytes_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's CPU generator keeps 32 bits of any seed, which known first tokens give away."""
    a, b = (torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1 + (7 << 32)))
    assert torch.equal(a, b), "torch uses the whole seed now; the noise might trust its generator again"
    taken: list[int] = []
    real = os.urandom
    monkeypatch.setattr(os, "urandom", lambda size: taken.append(size) or real(size))
    noise = Noise(NoiseScale(relative=0.1))
    for tokens in (7, 1, 1):
        taken.clear()
        noise.add(torch.ones(tokens, 64))
        assert sum(taken) >= 4 * tokens * 64


def test_gradients_pass_unchanged() -> None:
    hidden = torch.randn(5, 8, requires_grad=True)
    gradient = torch.randn(5, 8)
    Noise(NoiseScale(relative=0.5)).add(hidden).backward(gradient)
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, gradient)


def test_sigma_follows_everything_noised_so_far() -> None:
    """A decoded token, whose own spread is tiny or huge, gets the noise of the prompt before it."""
    generator = torch.Generator().manual_seed(1)
    parts = [5 + 3 * torch.randn(900, 64, generator=generator)]
    parts += [torch.randn(1, 64, generator=generator) * spread for spread in (1e-3, 1e-3, 10.0)]
    with pytest.warns(UserWarning, match="fixed noise seed"):
        noise = Noise(NoiseScale(relative=0.1), seed=5)
    repeated = torch.Generator().manual_seed(5)
    for index, part in enumerate(parts):
        standard = torch.randn(part.shape, generator=repeated)
        sigma = float(((noise.add(part) - part) / standard).median())
        so_far = torch.cat(parts[: index + 1]).double()
        assert sigma == pytest.approx(0.1 * float(so_far.std(correction=0)), rel=1e-3)
    assert sigma == pytest.approx(0.3, rel=0.05)


def test_a_fixed_seed_repeats_and_warns() -> None:
    results = []
    for seed in (3, 3, 4):
        with pytest.warns(UserWarning, match="can remove the noise"):
            noise = Noise(NoiseScale(absolute=0.1), seed=seed)
        results.append(noise.add(torch.zeros(3, 4)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_without_noise_nothing_is_touched_and_a_seed_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noise = Noise(NoiseScale(), seed=3)
    hidden = torch.randn(2, 3)
    assert noise.off
    assert noise.add(hidden) is hidden


def test_the_hidden_states_keep_their_dtype() -> None:
    added = Noise(NoiseScale(relative=0.1)).add(torch.ones(2, 3, dtype=torch.bfloat16))
    assert added.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [
        {"relative": 0.1, "absolute": 0.1},
        {"relative": 0.1, "mean_abs": 0.1},
        {"absolute": -0.1},
        {"relative": math.nan},
        {"mean_abs": math.inf},
    ],
)
def test_noise_that_cannot_be(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="noise"):
        NoiseScale(**options)


def test_a_seed_over_64_bits() -> None:
    with pytest.raises(UsageError, match="64-bit"), pytest.warns(UserWarning, match="fixed"):
        Noise(NoiseScale(relative=0.1), seed=1 << 70)


def test_the_same_place_has_the_same_noise_and_every_other_another() -> None:
    noise, hidden = Noise(NoiseScale(absolute=1.0)), torch.zeros(50, 64)
    secret = noise.secret()
    places = [(secret, 0, 0), (secret, 0, 1), (secret, 1, 0), (secret, 256, 0), (noise.secret(), 0, 0)]
    first, again = ([noise.add(hidden, repeatable(*place, hidden)) for place in places] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for at, one in enumerate(first):
        assert float(one.mean()) == pytest.approx(0, abs=5 / math.sqrt(one.numel()))
        assert float(one.std()) == pytest.approx(1, rel=5 / math.sqrt(2 * one.numel()))
        for other in first[:at]:
            assert abs(float((one * other).mean())) < 5 / math.sqrt(one.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_hidden_states_at_the_same_place_have_other_noise(dtype: torch.dtype) -> None:
    """Or the noise would cancel, and bare the difference."""
    noise, secret, hidden = Noise(NoiseScale(absolute=1.0)), bytes(32), HIDDEN[:50].to(dtype)
    close = hidden.clone()
    close[0, 0] += 1 / 16
    both = [noise.add(each, repeatable(secret, 0, 0, each)) - each for each in (hidden, close)]
    product = (both[0].float() * both[1].float()).mean()
    assert abs(float(product)) < 5 / math.sqrt(hidden.numel())


def test_its_secret_is_new_each_time_but_with_a_fixed_seed() -> None:
    assert len({Noise(NoiseScale()).secret() for _ in range(3)}) == 3
    fixed = [Noise(NoiseScale(), seed=seed).secret() for seed in (3, 3, 4)]
    assert fixed[0] == fixed[1] != fixed[2]


def test_moments_that_are_set_back_give_the_same_noise_again() -> None:
    noise = Noise(NoiseScale(relative=0.1))
    noise.add(HIDDEN)
    before, secret = noise.moments, noise.secret()
    other = 5 * HIDDEN[:40]
    first = noise.add(other, repeatable(secret, 0, 0, other))
    assert noise.moments != before
    noise.moments = before
    assert torch.equal(noise.add(other, repeatable(secret, 0, 0, other)), first)
