"""`--wire steps` end to end: what crosses is quantised, matched to the noise, and trains all the same."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from codec.messages import Backward, Extend, Forward, OpenRun, Result, Wire
from codec.plan import RunPlan
from silo_agent.microbatch import MicroBatch
from silo_agent.noise import Noise, NoiseScale
from silo_agent.trainer import Trainer
from silo_agent.wires import Wires

PLAN = RunPlan(steps=6, learning_rate=5e-3)


def losses(pool: Any, batches: list[MicroBatch], wire: Wire, scale: NoiseScale) -> list[float]:
    ends, remote = pool.ends(), pool.remote()
    ends.adapt(PLAN.lora, PLAN.seed)
    span = {"start": ends.trunk.start, "stop": ends.trunk.stop}
    remote.open(
        OpenRun(run="run", model=ends.card, plan=PLAN, encodings=Wires(wire).needed(), **span), [], wait=5
    )
    with pytest.warns(UserWarning, match="fixed noise seed") if scale.absolute else nullcontext():
        noise = Noise(scale, seed=3 if scale.absolute else None)
    trainer = Trainer(ends, remote, run="run", plan=PLAN, noise=noise, wires=Wires(wire))
    return [trainer.step(batches).loss for _ in range(PLAN.steps)]


def test_training_on_quantised_boundaries_follows_exact_training(
    new_pool: Callable[[], Any], random_batches: Callable[[int], list[MicroBatch]]
) -> None:
    batches, found, sizes = random_batches(3), {}, {}
    for wire in ("exact", "steps"):
        with new_pool() as pool:
            pool.start_worker()
            found[wire] = losses(pool, batches, wire, NoiseScale())
            kinds = (Forward, Backward, Result)
            sizes[wire] = sum(parcel.size for kind in kinds for parcel in pool.sent(kind))
            sent = [spec for kind in kinds for parcel in pool.sent(kind) for spec in parcel.header.tensors]
            assert {spec.encoding == "steps" for spec in sent} == {wire == "steps"}
    assert found["exact"][-1] < found["exact"][0] - 0.05, "nothing was learned"
    assert found["steps"] == pytest.approx(found["exact"], rel=0.01)
    assert found["steps"] != found["exact"]
    assert sizes["steps"] < sizes["exact"] / 2.5


def test_the_step_is_the_noise(
    new_pool: Callable[[], Any], random_batches: Callable[[int], list[MicroBatch]]
) -> None:
    with new_pool() as pool:
        pool.start_worker()
        losses(pool, random_batches(2), "steps", NoiseScale(absolute=0.125))
        assert {spec.step for parcel in pool.sent(Forward) for spec in parcel.header.tensors} == {0.125}


def test_a_session_decodes_on_quantised_boundaries(new_pool: Callable[[], Any], tiny: Any) -> None:
    """Logits stay near the whole model's, and a decoded token takes a fraction of its exact bytes."""
    ids = tiny.ids("a short note about a patient")
    with new_pool() as pool:
        pool.start_worker()
        with pool.session(wires=Wires("steps")) as session:
            session.extend([0], [ids[:-1]])
            logits = session.extend([0], [ids[-1:]])
        expected = tiny.logits(ids)[-1]
        assert torch.nn.functional.cosine_similarity(logits[0], expected, dim=0) > 0.999
        last = pool.sent(Extend)[-1]
        assert last.size < 4 * tiny.checkpoint.config.hidden_size / 2
