"""What split and centralised training are compared by."""

import pytest

from benchmarks.training import throughput_of, unpacked
from silo_agent.microbatch import Example, pack_examples

pytestmark = pytest.mark.timeout(60)


def test_examples_come_back_from_a_micro_batch() -> None:
    examples = [
        Example((5, 6, 7), (False, True, True)),
        Example((8, 9), (False, True)),
        Example((1, 2, 3, 4), (False, False, True, False)),
    ]
    assert unpacked(pack_examples(examples)) == examples


def test_throughput_leaves_the_first_step_out() -> None:
    def step(tokens: int, seconds: float, busy: float) -> dict[str, float]:
        return {"tokens": tokens, "seconds": seconds, "trunk_busy": busy}

    silos = [
        [step(1000, 9.0, 0.1), step(100, 1.0, 0.5), step(200, 3.0, 0.7)],
        [step(1000, 9.0, 0.1), step(300, 2.0, 0.5), step(400, 2.0, 0.7)],
    ]
    found = throughput_of(silos)
    assert found["split"] == pytest.approx(1000 / 4.0)
    assert found["trunk_busy"] == pytest.approx(0.6)
