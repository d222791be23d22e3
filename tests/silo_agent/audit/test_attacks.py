"""Every attack reads the text where nothing hides it, and nothing where nothing of it is there."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from silo_agent.audit.attack import NO_GUESS, Attack, Seen
from silo_agent.audit.attacks import all_attacks, chosen_attacks
from silo_agent.audit.averaging import Averaged
from silo_agent.audit.decoder import Decoder
from silo_agent.audit.gradients import Gradients
from silo_agent.audit.matching import Matching
from silo_agent.audit.nearest import Nearest
from silo_agent.audit.search import Search
from silo_agent.audit.unseen import Unseen
from silo_agent.noise import NoiseScale

QUIET = NoiseScale()
EVERY = 512
"""The tiny model's vocabulary."""


def recovered(scene: Any, attack: Attack, seen: list[Seen]) -> float:
    """The share of what it looks for that it names; counted here, not by the audit's scoring."""
    right = total = 0
    for text, guess in zip(scene.texts, attack.guess(scene.knowledge, seen), strict=True):
        assert guess.dtype == torch.int64
        assert guess.shape == (len(text.ids),)
        for at in range(len(scene.begin), len(text.ids)):
            if attack.about == "text" or (text.answer[at] and at):
                right, total = right + (int(guess[at]) == text.ids[at]), total + 1
    return right / total


@pytest.mark.parametrize(
    ("attack", "head", "tail", "least"),
    [
        (Nearest(), 0, 2, 1.0),
        (Search(EVERY), 0, 2, 1.0),
        (Search(EVERY), 1, 2, 1.0),
        (Search(EVERY), 2, 2, 1.0),
        (Averaged(Search(EVERY)), 2, 2, 1.0),
        (Matching(), 0, 2, 1.0),
        (Matching(), 1, 2, 0.3),
        (Decoder(rate=5e-3), 0, 2, 0.85),
        (Decoder(rate=5e-3), 1, 2, 0.4),
        (Decoder(rate=5e-3, pretrained=False), 0, 2, 0.6),
        (Gradients(), 2, 0, 1.0),
        (Gradients(), 2, 1, 1.0),
        (Gradients(), 2, 2, 1.0),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else str(value),
)
def test_it_reads_the_text_without_noise(
    scene: Callable[..., Any], attack: Attack, head: int, tail: int, least: float
) -> None:
    here = scene(head, tail)
    assert recovered(here, attack, here.seen(QUIET)) >= least


def unrelated(seen: Seen) -> Seen:
    """As large as what was seen, and random: what noise without end leaves of it."""
    generator = torch.Generator().manual_seed(len(seen.releases))

    def drawn(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) * tensor.std()

    releases = tuple(drawn(release) for release in seen.releases)
    return replace(
        seen,
        releases=releases,
        sigma=float(seen.releases[0].std()),
        output=drawn(seen.output),
        gradient=drawn(seen.gradient),
    )


@pytest.mark.parametrize(
    "attack",
    [
        Unseen(),
        Nearest(),
        Search(EVERY),
        Averaged(Nearest()),
        Averaged(Search(EVERY)),
        Matching(steps=40),
        Decoder(steps=40),
        Gradients(),
    ],
    ids=lambda attack: attack.name,
)
def test_it_reads_nothing_where_there_is_nothing(scene: Callable[..., Any], attack: Attack) -> None:
    here = scene(1, 1)
    seen = [unrelated(text) for text in here.seen(QUIET, releases=4)]
    assert recovered(here, attack, seen) <= 0.08


def test_search_reads_through_noise_as_strong_as_the_states(scene: Callable[..., Any]) -> None:
    """Half the states' own deviation: hundreds of elements outvote it."""
    here = scene(2, 2)
    assert recovered(here, Search(EVERY), here.seen(NoiseScale(relative=0.3), "steps")) >= 0.9


def test_averaging_undoes_noise(scene: Callable[..., Any]) -> None:
    here = scene(0, 2)
    seen = here.seen(NoiseScale(relative=3.0), "steps", releases=64)
    alone, averaged = (recovered(here, attack, seen) for attack in (Nearest(), Averaged(Nearest())))
    assert alone < 0.5
    assert averaged > 0.95


def test_gradients_tell_which_positions_bear_loss(scene: Callable[..., Any]) -> None:
    here = scene(2, 0)
    for text, guess in zip(here.texts, Gradients().guess(here.knowledge, here.seen(QUIET)), strict=True):
        assert [token != NO_GUESS for token in guess.tolist()] == [False, *text.answer[1:]]


def test_attacks_have_names_of_their_own() -> None:
    known = all_attacks(8)
    assert {"nearest", "search", "decoder", "matching", "gradients", "averaged-search"} <= set(known)
    assert [attack.name for attack in chosen_attacks("search, nearest,search", 8)] == ["search", "nearest"]
