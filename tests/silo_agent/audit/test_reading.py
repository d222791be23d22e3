"""Candidates side by side get the states that the unsplit model gives each behind the same words."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from silo_agent.audit.reading import Reading


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "granite"])
def test_states_equal_the_unsplit_models(
    tiny_model: Callable[[str], Any], split: Callable[..., Any], name: str
) -> None:
    """Two rows of different lengths, one beyond the sliding window of those that have one."""
    model, head = tiny_model(name), 2
    texts = [[5, 9, 40], [7, 8, 9, 10, 11, 12, 13, 14, 15]]
    candidates = torch.tensor([[3, 50, 60, 3], [9, 1, 2, 96]])
    front, _, _ = split(model.checkpoint, head, 1)
    reading = Reading([front], rows=2, capacity=20)
    reading.read([0, 1], texts)
    for _ in range(2):  # Trying adds nothing.
        found = reading.next_states([0, 1], candidates)
        for row, text in enumerate(texts):
            for number, token in enumerate(candidates[row].tolist()):
                ids = torch.tensor([[*text, token]])
                states = model.whole(ids, output_hidden_states=True).hidden_states[head][0, -1]
                torch.testing.assert_close(found[row, number], states, atol=3e-5, rtol=0)


def test_it_says_what_comes_next(tiny: Any, split: Callable[..., Any]) -> None:
    reading = Reading(split(tiny.checkpoint, 2, 2), rows=2, capacity=40)
    first, second = tiny.ids("The patient came in"), tiny.ids("this morning")
    reading.read([0, 1], [first[:2], second[:1]])
    reading.next_states([0, 1], torch.tensor([[4, 5], [6, 7]]))
    found = reading.read([0, 1], [first[2:], second[1:]])
    for row, ids in enumerate((first, second)):
        torch.testing.assert_close(found[row], tiny.logits(ids)[-1], atol=3e-5, rtol=0)
