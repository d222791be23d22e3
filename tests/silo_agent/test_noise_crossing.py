"""What really leaves is noised: the frames on the wire, with and without."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from broker.parcel import Parcel
from codec.messages import Extend, Forward
from codec.plan import LoraPlan, RunPlan
from codec.tensors import decode_tensors
from silo_agent.microbatch import MicroBatch
from silo_agent.noise import Noise, NoiseScale

SIGMA = 0.5


def frames(parcels: list[Parcel]) -> list[Tensor]:
    return [decode_tensors(p.header.tensors, p.buffers(), boundary="test")[0] for p in parcels]


def generated(pool: Any, noise: Noise) -> list[Tensor]:
    """Frames of a prompt of 30 tokens and ten decoded ones; the same tokens each time."""
    pool.broker.passed.clear()
    tokens = [list(range(3, 33)), *([t] for t in range(50, 60))]
    with pool.session(noise=noise) as session:
        for part in tokens:
            session.extend([0], [part])
    sent = frames(pool.sent(Extend))
    assert [len(frame) for frame in sent] == [len(part) for part in tokens]
    return sent


def test_every_generation_frame_is_noised_anew(pool: Any) -> None:
    clean, again = generated(pool, Noise(NoiseScale())), generated(pool, Noise(NoiseScale()))
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True)), "the runs must compare"
    noisy = [generated(pool, Noise(NoiseScale(absolute=SIGMA))) for _ in range(2)]
    added = [[b - a for a, b in zip(clean, run, strict=True)] for run in noisy]
    for run in added:
        for part in run:
            assert float(part.std()) == pytest.approx(SIGMA, rel=0.5), "a frame went out without noise"
        assert float(torch.cat(run).std()) == pytest.approx(SIGMA, rel=0.06)
    for one, other in zip(*added, strict=True):
        assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.6
    joined = torch.stack([torch.cat(run).flatten() for run in added])
    assert abs(float(torch.corrcoef(joined)[0, 1])) < 0.1, "two generations share their noise"


def test_a_decoded_token_gets_the_prompts_noise(pool: Any) -> None:
    clean = generated(pool, Noise(NoiseScale()))
    noisy = generated(pool, Noise(NoiseScale(relative=0.2)))
    prompt = 0.2 * float(clean[0].std())
    decoded = torch.cat(noisy[1:]) - torch.cat(clean[1:])
    assert float(decoded.std()) == pytest.approx(prompt, rel=0.25)


def test_every_generated_vector_is_clipped(pool: Any) -> None:
    clean = generated(pool, Noise(NoiseScale()))
    bound = float(torch.cat(clean).norm(dim=1).median())
    for before, after in zip(clean, generated(pool, Noise(NoiseScale(clip=bound))), strict=True):
        factor = (bound / before.norm(dim=1, keepdim=True)).clamp_max(1)
        assert torch.allclose(after, before * factor, rtol=1e-5, atol=1e-6)


def trained(pool: Any, noise: Noise, batches: list[MicroBatch]) -> list[Tensor]:
    """Frames of one step. Its heads all see the adapter's first values, so they can be compared."""
    pool.broker.passed.clear()
    plan = RunPlan(steps=1, lora=LoraPlan(rank=2))
    pool.trainer(plan, noise=noise).step(batches)
    return frames(pool.sent(Forward))


def test_every_training_frame_is_noised_anew(
    new_pool: Callable[[], Any], random_batches: Callable[[int], list[MicroBatch]]
) -> None:
    batches = [*random_batches(3), random_batches(1)[0]]
    runs = []
    for noise in (Noise(NoiseScale()), Noise(NoiseScale(absolute=SIGMA))):
        with new_pool() as pool:
            pool.start_worker()
            runs.append(trained(pool, noise, batches))
    added = [b - a for a, b in zip(*runs, strict=True)]
    assert len(added) == 4
    for part in added:
        assert float(part.std()) == pytest.approx(SIGMA, rel=0.15), "a frame went out without noise"
    first, last = added[0].flatten(), added[3].flatten()
    assert abs(float(torch.corrcoef(torch.stack([first, last]))[0, 1])) < 0.2, "one noise, sent twice"
