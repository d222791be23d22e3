"""Micro-batches of several silos and runs, joined, cut apart and computed again: the gradients stay."""

import gc
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from codec.errors import LimitError, MismatchError, UnknownNameError
from codec.partition import Span as Blocks
from codec.plan import LoraPlan, RunPlan
from workers.activations import Activations, Gradient, MicroBatch
from workers.busy import Busy
from workers.checkpoint import Checkpoint
from workers.run import TrunkRun
from workers.span import Span

NORTH, SOUTH, EAST = b"north...", b"south...", b"east...."
HIDDEN, AMPLE = 64, 1 << 30
PLAN = RunPlan(silos=2, lora=LoraPlan(rank=2, targets=("q_proj", "v_proj")))
Runs = dict[str, TrunkRun]


@pytest.fixture(scope="module")
def span(tiny_checkpoint: Checkpoint) -> Span:
    return Span(tiny_checkpoint, Blocks(1, 5))


@pytest.fixture
def runs(span: Span) -> Iterator[Runs]:
    """Two runs over different blocks, whose adapters do something."""
    busy = Busy(span.device)
    made = {
        "first": TrunkRun(span, "a", PLAN, Blocks(1, 5), {}, busy),
        "second": TrunkRun(span, "b", PLAN, Blocks(2, 4), {}, busy),
    }
    generator = torch.Generator().manual_seed(5)
    for run in made.values():
        for parameter in run.parameters.values():
            parameter.data.normal_(0, 0.2, generator=generator)
    yield made
    for run in made.values():
        run.close()


def batch(runs: Runs, silo: bytes, run: str, number: int, *lengths: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(number * 100 + silo[0])
    entry = torch.randn(sum(lengths), HIDDEN, generator=generator)
    return MicroBatch((silo, run, number), runs[run], entry, lengths)


def gradient(of: MicroBatch, wanted: bool = True) -> Gradient:
    generator = torch.Generator().manual_seed(of.key[2] + 1)
    return Gradient(of.key, torch.randn(of.entry.shape, generator=generator), wanted)


def work(runs: Runs) -> list[MicroBatch]:
    return [
        batch(runs, NORTH, "first", 0, 5, 3),
        batch(runs, SOUTH, "first", 1, 4),
        batch(runs, EAST, "second", 2, 7, 1),
    ]


def grads(runs: Runs) -> list[Tensor]:
    found = [p.grad for run in runs.values() for p in run.parameters.values()]
    for run in runs.values():
        for parameter in run.parameters.values():
            parameter.grad = None
    assert all(grad is not None for grad in found)
    return [grad for grad in found if grad is not None]


def alone(span: Span, runs: Runs) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs, gradients at the inputs, and adapters' gradients, one micro-batch after another."""
    store, outputs, inputs = Activations(span, AMPLE, AMPLE), [], []
    for one in work(runs):
        outputs += store.forward([one])
        inputs += store.backward([gradient(one)])
    return outputs, [grad for grad in inputs if grad is not None], grads(runs)


def assert_close(found: Sequence[Tensor | None], wanted: Sequence[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("budget", [AMPLE, 40_000], ids=["kept", "computed again"])
@pytest.mark.parametrize("order", [[[0, 1, 2]], [[0], [1], [2]], [[2, 0], [1]]], ids=str)
def test_together_is_as_alone(span: Span, runs: Runs, budget: int, order: list[list[int]]) -> None:
    outputs, inputs, adapters = alone(span, runs)
    store, batches = Activations(span, AMPLE, AMPLE), work(runs)
    if budget < AMPLE:
        store.forward([batch(runs, NORTH, "first", 9, 1)])  # What activations take is known now.
        store.drop((NORTH, "first", 9))
        store._budget = budget
    assert_close(store.forward(batches), outputs)
    assert list(store.members.values()) == [3]
    assert (store.held > sum(one.entry.nbytes for one in batches)) == (budget == AMPLE)
    found: dict[int, Tensor | None] = {}
    for members in order:
        back = store.backward([gradient(batches[member]) for member in members])
        found.update(zip(members, back, strict=True))
    assert_close([found[member] for member in range(3)], inputs)
    assert_close(grads(runs), adapters)
    assert store.held == 0
    assert not store.members


def test_a_silo_that_leaves_takes_its_part_out_of_the_group(span: Span, runs: Runs) -> None:
    _, inputs, _ = alone(span, runs)
    store, batches = Activations(span, AMPLE, AMPLE), work(runs)
    store.forward(batches)
    store.drop_all(runs["first"], SOUTH)
    back = store.backward([gradient(batches[0]), gradient(batches[2])])
    assert_close(back, [inputs[0], inputs[2]])
    with pytest.raises(UnknownNameError, match="no micro-batch 1 of yours"):
        store.check(gradient(batches[1]))
    assert store.held == 0
    assert not store.members


def test_a_step_of_one_run_does_not_spoil_another_that_went_forward_with_it(span: Span, runs: Runs) -> None:
    _, inputs, _ = alone(span, runs)
    store, batches = Activations(span, AMPLE, AMPLE), work(runs)
    store.forward(batches)
    store.backward([gradient(batches[0]), gradient(batches[1])])
    with torch.no_grad():
        for parameter in runs["first"].parameters.values():
            parameter.add_(1.0)
    assert_close(store.backward([gradient(batches[2])]), inputs[2:])


def test_sent_again_it_begins_anew(span: Span, runs: Runs) -> None:
    store, one = Activations(span, AMPLE, AMPLE), batch(runs, NORTH, "first", 0, 5)
    store.forward([one])
    held = store.held
    store.forward([batch(runs, NORTH, "first", 0, 5)])
    assert store.held == pytest.approx(held, rel=0.01)
    assert list(store.members.values()) == [1]


def test_a_gradient_that_nobody_wants_is_not_computed(span: Span, runs: Runs) -> None:
    store, one = Activations(span, AMPLE, AMPLE), batch(runs, NORTH, "first", 0, 5)
    store.forward([one])
    assert store.backward([gradient(one, wanted=False)]) == [None]
    assert all(p.grad is not None for p in runs["first"].parameters.values())


def test_what_does_not_fit_is_refused_clearly(span: Span, runs: Runs) -> None:
    store, one = Activations(span, 2000, 2000), batch(runs, NORTH, "first", 0, 5)
    store.check_room(one)
    store.forward([one])
    with pytest.raises(LimitError, match="wait for their backward"):
        store.check_room(batch(runs, NORTH, "first", 1, 5))
    with pytest.raises(MismatchError, match=r"a gradient \(4, 64\) for an output \(5, 64\)"):
        store.check(Gradient(one.key, torch.zeros(4, HIDDEN)))


def test_the_measure_of_a_graph_is_what_it_holds(span: Span, runs: Runs) -> None:
    """Against all tensors that autograd reaches from the output, weights left out."""
    store, one = Activations(span, AMPLE, AMPLE), batch(runs, NORTH, "first", 0, 40)
    store.forward([one])
    output = store._kept[one.key].output
    assert output is not None
    weights = {p.untyped_storage().data_ptr() for p in span.model.parameters()}
    storages: dict[int, int] = {}
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_saved_") and not name.startswith("_saved_tensors"):
                value = getattr(node, name)
                for saved in value if isinstance(value, tuple) else (value,):
                    if isinstance(saved, Tensor) and saved.untyped_storage().data_ptr() not in weights:
                        storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
    total = sum(storages.values())
    assert store.held == pytest.approx(total + one.entry.nbytes, rel=0.1)


def test_a_graph_that_never_goes_backward_is_freed(span: Span, runs: Runs) -> None:
    """Also the first one of a run, which is measured."""

    def left_over() -> int:
        """Tensors there are once a measured forward is over and dropped."""
        store, one = Activations(span, AMPLE, AMPLE), batch(runs, NORTH, "first", 0, 5)
        store.forward([one])
        store.drop(one.key)
        del store, one
        gc.collect()
        return sum(type(found) is Tensor for found in gc.get_objects())

    assert left_over() == left_over()
