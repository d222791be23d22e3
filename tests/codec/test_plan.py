"""What a run agrees on: its learning rate, its limits, and whose model it is about."""

import math
from typing import Any

import msgspec
import pytest
import torch
from transformers import get_scheduler

from codec.errors import UsageError
from codec.plan import LoraPlan, ModelCard, RunPlan, checked_plan

THEIR_NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@pytest.mark.parametrize("schedule", THEIR_NAMES)
@pytest.mark.parametrize(("steps", "warmup"), [(10, 0), (10, 3), (1, 0), (7, 1), (5, 5), (4, 9), (200, 20)])
def test_rates_are_those_of_transformers(schedule: Any, steps: int, warmup: int) -> None:
    plan = RunPlan(steps=steps, warmup_steps=warmup, schedule=schedule, learning_rate=3e-3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    scheduler = get_scheduler(
        THEIR_NAMES[schedule], optimizer, num_warmup_steps=warmup, num_training_steps=steps
    )
    for step in range(steps):
        assert plan.rate_at(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_after_the_last_step_the_rate_stays_at_zero(schedule: Any) -> None:
    plan = RunPlan(steps=10, schedule=schedule)
    assert [plan.rate_at(step) for step in (10, 11, 15, 1000)] == pytest.approx([0.0] * 4, abs=1e-15)


def test_a_plan_from_the_command_line_is_checked() -> None:
    plan = checked_plan(silos=2, steps=5, learning_rate=1e-4, schedule="cosine", ends="shared")
    assert plan == RunPlan(silos=2, steps=5, learning_rate=1e-4, schedule="cosine", ends="shared")
    assert checked_plan() == RunPlan()
    assert checked_plan(lora=LoraPlan(rank=4)).lora == LoraPlan(rank=4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("silos", 0),
        ("steps", 0),
        ("steps", 1.5),
        ("learning_rate", 0.0),
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("warmup_steps", -1),
        ("schedule", "exponential"),
        ("ends", "averaged"),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("betas", (0.9,)),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("weight_decay", math.inf),
        ("clip_norm", -1.0),
        ("clip_norm", math.nan),
        ("seed", "one"),
        ("lora", {"rank": 0}),
        ("lora", {"rank": 1025}),
        ("lora", {"alpha": 0.0}),
        ("lora", {"targets": [""]}),
        ("no_such_field", 1),
    ],
)
def test_a_value_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(UsageError, match="this run cannot be") as caught:
        checked_plan(**{field: value})
    assert field in caught.value.what


@pytest.mark.parametrize(
    ("silos", "members", "what"),
    [
        (1, ("north", "south"), "2 members are named"),
        (2, ("south", "north"), "must be sorted"),
        (2, ("north", "north"), "each named once"),
        (2, ("", "north"), "length >= 1"),
    ],
)
def test_members_are_sorted_and_as_many_as_the_silos(silos: int, members: Any, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        checked_plan(silos=silos, members=members)
    raw = msgspec.msgpack.encode({"silos": silos, "members": members})
    with pytest.raises(msgspec.ValidationError, match=what):
        msgspec.msgpack.decode(raw, type=RunPlan)


def test_members_are_part_of_the_plan() -> None:
    assert checked_plan(silos=2, members=("north", "south")).members == ("north", "south")


@pytest.mark.parametrize("plan", [RunPlan(), LoraPlan(), ModelCard("m", "f", 4, 8, {2: "ab"})])
def test_plans_and_cards_cannot_be_changed(plan: Any) -> None:
    field = plan.__struct_fields__[0]
    with pytest.raises(AttributeError):
        setattr(plan, field, getattr(plan, field))
    assert msgspec.convert(msgspec.to_builtins(plan), type(plan)) == plan


def card(**changes: Any) -> ModelCard:
    facts = {"name": "m", "fingerprint": "f", "blocks": 4, "hidden": 8, "samples": {0: "a", 1: "b", 2: "c"}}
    return ModelCard(**{**facts, **changes})


def test_cards_of_one_model_agree_on_what_both_can_read() -> None:
    assert card().differs_from(card(name="/another/place")) == ""
    assert card().differs_from(card(samples={})) == ""
    assert card().differs_from(card(samples={2: "c", 3: "unknown here"})) == ""


def test_cards_of_two_models_say_where_they_differ() -> None:
    assert card().differs_from(card(fingerprint="g")) == "their architectures or tensors differ"
    found = card().differs_from(card(samples={2: "x", 1: "x", 0: "a"}))
    assert found == "their weights differ, first in block 1"
    assert card(samples={2: "x", 1: "x", 0: "a"}).differs_from(card()) == found
