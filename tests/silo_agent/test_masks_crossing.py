"""Attention that is not causal: the split model sees what the whole one sees, and no dense mask crosses."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from codec.errors import FrameError, MismatchError, UsageError
from codec.masks import decode_mask
from codec.messages import Extend, Forward, MaskSpec, OpenRun
from codec.plan import RunPlan
from silo_agent.microbatch import Example, MicroBatch, pack_examples
from silo_agent.noise import Noise, NoiseScale
from silo_agent.packed import pack
from silo_agent.trainer import Trainer

PLAN = RunPlan(steps=3, learning_rate=5e-3)


def prefix(length: int, known: int) -> Tensor:
    """The first `known` tokens see each other both ways, the rest is causal."""
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:known, :known] = True
    return mask


def whole_logits(whole: Any, ids: list[int], mask: Tensor) -> Tensor:
    """Plain transformers with the mask in full."""
    with torch.no_grad():
        return whole(input_ids=torch.tensor([ids]), attention_mask=mask[None, None]).logits[0]


def test_a_session_reads_a_prefix_both_ways(new_pool: Callable[[], Any], tiny: Any) -> None:
    ids = tiny.ids("a short note about a patient who is well again")
    known = len(ids) - 3
    expected = whole_logits(tiny.whole, ids, prefix(len(ids), known))
    assert not torch.allclose(expected, tiny.logits(ids), atol=1e-2), "the mask must matter"
    with new_pool() as pool:
        pool.start_worker()
        with pool.session(rows=2) as session:
            # Two rows at once, then the rest one by one: cached tokens are seen by all that follow.
            both = torch.block_diag(prefix(known, known), prefix(4, 2)).bool()
            first = session.extend([0, 1], [ids[:known], ids[:4]], mask=both)
            rest = [session.extend([0], [[token]]) for token in ids[known:]]
        found = torch.cat([first[:1], *rest])
        assert torch.allclose(found, expected[known - 1 :], atol=2e-5)
        alone = whole_logits(tiny.whole, ids[:4], prefix(4, 2))
        assert torch.allclose(first[1], alone[-1], atol=2e-5)
        sent = pool.sent(Extend)
        assert [parcel.header.mask is not None for parcel in sent] == [True, *[False] * 3]


def masked_batch(rows: list[list[int]], known: int) -> MicroBatch:
    batch = pack_examples([Example(tuple(ids), tuple(t >= known for t in range(len(ids)))) for ids in rows])
    mask = torch.block_diag(*[prefix(len(ids), known) for ids in rows]).bool()
    return MicroBatch(batch.ids, batch.lengths, batch.keep, batch.targets, mask)


def test_training_on_masked_batches_is_the_whole_models(new_pool: Callable[[], Any], tiny: Any) -> None:
    torch.manual_seed(0)
    rows = [torch.randint(5, 200, (length,)).tolist() for length in (40, 25)]
    batch = masked_batch(rows, 10)
    summed = sum(
        float(
            F.cross_entropy(
                whole_logits(tiny.whole, ids, prefix(len(ids), 10))[9:-1],
                torch.tensor(ids[10:]),
                reduction="sum",
            )
        )
        for ids in rows
    )
    with new_pool() as pool:
        pool.start_worker()
        ends, remote = pool.ends(), pool.remote()
        ends.adapt(PLAN.lora, PLAN.seed)
        trunk = ends.trunk
        remote.open(
            OpenRun(run="run", model=ends.card, plan=PLAN, start=trunk.start, stop=trunk.stop), [], wait=5
        )
        trainer = Trainer(ends, remote, run="run", plan=PLAN, noise=Noise(NoiseScale()))
        losses = [trainer.step([batch]).loss for _ in range(3)]
        (parcel, *_) = pool.sent(Forward)
    assert losses[0] == pytest.approx(summed / len(batch.keep), abs=1e-5)
    assert losses[-1] < losses[0]
    spec, frame = parcel.header.mask, bytes(parcel.buffers()[-1])
    assert batch.mask is not None
    assert np.array_equal(decode_mask(spec, frame), batch.mask.numpy())
    assert len(frame) <= batch.mask.numel() / 8 / 4, "even of 65 tokens: a quarter of one bit per element"


def test_a_mask_of_another_size_is_refused_and_disturbs_nothing(
    new_pool: Callable[[], Any], tiny: Any
) -> None:
    ids = tiny.ids("a short note about a patient")
    with new_pool() as pool:
        pool.start_worker()
        remote = pool.remote()
        with pool.session(remote=remote) as session:
            request = Extend(session=session._name, rows=(0,), starts=(0,), lengths=(len(ids),))
            packed = pack(request, [torch.zeros(len(ids), 64)], mask=torch.ones(2, 2, dtype=torch.bool))
            with pytest.raises(MismatchError, match=f"a mask of 2 by 2 for {len(ids)} tokens"):
                remote.wait(remote.send(packed))
            logits = session.extend([0], [ids])
        assert torch.allclose(logits[0], tiny.logits(ids)[-1], atol=2e-5)


def test_a_token_that_sees_nothing_is_refused_on_either_side(new_pool: Callable[[], Any], tiny: Any) -> None:
    blind = torch.ones(3, 3, dtype=torch.bool).tril()
    blind[1, 1] = False
    with pytest.raises(UsageError, match="token 1 does not see itself"):
        MicroBatch(torch.arange(3), (3,), torch.tensor([0]), torch.tensor([1]), blind)
    with new_pool() as pool:
        pool.start_worker()
        remote = pool.remote()
        with pool.session(remote=remote) as session:
            with pytest.raises(UsageError, match="bool and square"):
                session.extend([0], [[5, 6, 7]], mask=torch.ones(4, 4, dtype=torch.bool))
            request = Extend(session=session._name, rows=(0,), starts=(0,), lengths=(3,))
            with pytest.raises(MismatchError, match="does not see itself"):
                remote.wait(remote.send(pack(request, [torch.zeros(3, 64)], mask=blind)))


def test_a_mask_without_its_frame_is_refused(new_pool: Callable[[], Any], tiny: Any) -> None:
    with new_pool() as pool:
        pool.start_worker()
        remote = pool.remote()
        with pool.session(remote=remote) as session:
            lost = Extend(
                session=session._name, rows=(0,), starts=(0,), lengths=(1,), mask=MaskSpec(1, 1, 0, 0)
            )
            with pytest.raises(FrameError):
                remote.call(lost, [torch.zeros(1, 64)])
