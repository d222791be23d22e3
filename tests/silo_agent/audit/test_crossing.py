"""What is attacked is what crosses: compared with the frames of a real trainer and worker."""

from typing import Any

import pytest
import torch

from broker.parcel import Parcel
from codec.messages import Backward, Forward
from codec.plan import LoraPlan, RunPlan
from codec.tensors import decode_tensors
from silo_agent.audit.crossing import Crossing
from silo_agent.microbatch import Example, pack_examples
from silo_agent.noise import Noise, NoiseScale
from silo_agent.wires import Wires
from workers.span import Span

PLAN = RunPlan(silos=1, steps=1, lora=LoraPlan(rank=4, alpha=8.0, targets=("q_proj",)), learning_rate=1e-3)


def decoded(parcel: Parcel) -> torch.Tensor:
    return decode_tensors(parcel.header.tensors, parcel.buffers(), boundary="test")[0]


def test_it_is_what_a_trainer_sends(pool: Any, tiny: Any, notes: list[Example]) -> None:
    """But for the noise, which each draws by itself (below)."""
    pool.trainer(PLAN, noise=Noise(NoiseScale())).step([pack_examples(notes[:1])])
    ends = pool.ends()
    crossing = Crossing(ends, Span(tiny.checkpoint, ends.trunk), Noise(NoiseScale()), Wires("exact"))
    seen = crossing.send(notes[0])
    (forward,), (backward,) = pool.sent(Forward), pool.sent(Backward)
    torch.testing.assert_close(seen.releases[0], decoded(forward), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.gradient, decoded(backward), atol=1e-5, rtol=0)


def test_releases_share_the_states_and_not_the_noise(scene: Any) -> None:
    here = scene(2, 2)
    (clean, *_), (noisy, *_) = here.seen(NoiseScale()), here.seen(NoiseScale(absolute=0.5), releases=3)
    added = torch.stack(noisy.releases) - clean.releases[0]
    assert added.flatten(1).std(dim=1).tolist() == pytest.approx([0.5] * 3, rel=0.06)
    assert (torch.corrcoef(added.flatten(1)) - torch.eye(3)).abs().max() < 0.1
    assert noisy.sigma == pytest.approx(0.5)
    assert clean.sigma == 0


@pytest.mark.parametrize("scale", [NoiseScale(), NoiseScale(absolute=0.5)])
def test_the_deviation_counts_what_the_wire_rounds(scene: Any, scale: NoiseScale) -> None:
    here = scene(2, 2)
    (exact, *_), (rounded, *_) = here.seen(NoiseScale()), here.seen(scale, "steps")
    assert float((rounded.releases[0] - exact.releases[0]).std()) == pytest.approx(rounded.sigma, rel=0.06)
