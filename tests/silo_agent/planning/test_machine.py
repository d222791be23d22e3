"""One block of a kind stands for all: what is measured against the ends that a silo really loads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from codec.partition import Partition
from codec.plan import LoraPlan
from silo_agent.ends import Ends
from silo_agent.planning.machine import Machine
from silo_agent.planning.proposal import Block, Measured, Rest, candidate
from silo_agent.planning.work import Work, generating_work
from workers.families import FAMILIES, lora_targets
from workers.graph import metered
from workers.kv import PAGE, RowCache

LENGTHS = (9, 20, 3)
LEARN = Work(True, LENGTHS, 11, most=64, most_predicted=30, flights=2)
CUT = Partition(2, 1)

every_model = pytest.mark.parametrize("name", [*FAMILIES, "llama-tied"])


@pytest.fixture(scope="module")
def measure(tiny_model: Callable[[str], Any]) -> Callable[..., tuple[tuple[Block, ...], Rest]]:
    def get(name: str, work: Work) -> tuple[tuple[Block, ...], Rest]:
        checkpoint = tiny_model(name).checkpoint
        lora = LoraPlan(rank=3, targets=lora_targets(checkpoint.config, "all"))
        machine = Machine(checkpoint, work, lora, dtype=torch.float32, device=torch.device("cpu"))
        return machine.blocks(), machine.rest()

    return get


@every_model
def test_memory_is_that_of_the_real_ends(
    measure: Callable[..., Any], tiny_model: Callable[[str], Any], name: str
) -> None:
    blocks, rest = measure(name, LEARN)
    checkpoint = tiny_model(name).checkpoint
    assert len(blocks) == checkpoint.blocks
    ends, kept = Ends(checkpoint, CUT), (*blocks[:2], blocks[-1])
    weights = {p.data_ptr(): p.nbytes for s in (ends.head, ends.tail) for p in s.model.parameters()}
    assert rest.weights + sum(block.weights for block in kept) == sum(weights.values())

    ends.adapt(LoraPlan(rank=3, targets=lora_targets(ends.config, "all")), seed=0)
    assert sum(block.adapter for block in kept) == sum(tensor.nbytes for tensor in ends.adapter().values())

    with metered(ends.head) as meter:
        ends.head.run(torch.arange(sum(LENGTHS)), LENGTHS, adapter=ends.adapter_key)
    predicted = sum(LENGTHS) * sum(block.graph for block in blocks[:2])
    assert 0.95 * meter.bytes <= predicted <= 1.5 * meter.bytes

    cache = RowCache(ends.head.kv_shape(), PAGE)
    cache.check_room(PAGE)
    assert cache.bytes == PAGE * sum(block.cache for block in blocks[:2])


@every_model
def test_times_are_positive_and_only_training_goes_back(measure: Callable[..., Any], name: str) -> None:
    for work in (LEARN, generating_work(3, 40)):
        blocks, rest = measure(name, work)
        assert rest.embed_s > 0
        assert rest.predict_s > 0
        for block in blocks:
            assert block.forward_s > 0
            assert (block.backward_s > 0) is work.training
            assert (block.adapter > 0) is work.training
        measured = Measured(blocks, rest, hidden=32, memory=1 << 40)
        one, two = (candidate(measured, work, Partition(n, 1)) for n in (1, 2))
        assert two.silo_s > one.silo_s
        assert two.memory > one.memory


def test_blocks_of_a_kind_are_measured_once(measure: Callable[..., Any]) -> None:
    """This model's kinds are sliding, full, full, sliding."""
    sliding, full, also_full, also_sliding = measure("gemma3_text", LEARN)[0]
    assert sliding is also_sliding
    assert full is also_full
    assert sliding is not full


def test_long_data_is_measured_in_one_pass_that_is_full(tiny_model: Callable[[str], Any]) -> None:
    work = Work(True, (200,) * 40, 4000, most=8000, most_predicted=4000, flights=1)
    machine = Machine(
        tiny_model("llama").checkpoint, work, LoraPlan(), dtype=torch.float32, device=torch.device("cpu")
    )
    assert machine._lengths == (200, 200)
    assert machine.rest().predict_s > 0
