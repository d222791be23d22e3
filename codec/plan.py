"""What the parties of a run agree on before it starts: the adapter and how it is trained."""

import math
from itertools import pairwise
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from codec.errors import UsageError
from codec.limits import MAX_NAME, MAX_REAL

Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
ModelName = Annotated[str, Meta(max_length=512)]
Real = Annotated[float, Meta(ge=0, le=MAX_REAL)]
Positive = Annotated[float, Meta(gt=0, le=MAX_REAL)]
Share = Annotated[float, Meta(ge=0, lt=1)]
Ends = Literal["own", "shared"]
Schedule = Literal["constant", "linear", "cosine"]


class LoraPlan(Struct, frozen=True, forbid_unknown_fields=True):
    """LoRA as PEFT understands it: `rank`, `alpha` and the names of the adapted linear layers."""

    rank: Annotated[int, Meta(ge=1, le=1024)] = 8
    alpha: Positive = 16.0
    targets: tuple[Name, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


class RunPlan(Struct, frozen=True, forbid_unknown_fields=True):
    """One fine-tuning job in `client-batch` mode.

    `silos` take part in every step. With `ends="own"` each silo keeps its own head and tail
    adapters (the paper's way); with `"shared"` their gradients are summed at every commit too.
    `clip_norm` bounds the norm of the whole gradient, over all parts; 0 turns clipping off.
    `seed` decides the adapters' initial values, whatever the partition. `members` are the names of the
    silos that may take part, sorted; with none it is whoever comes first. Runs of one name and other
    members are different runs.
    """

    silos: Annotated[int, Meta(ge=1, le=4096)] = 1
    steps: Annotated[int, Meta(ge=1)] = 10
    ends: Ends = "own"
    lora: LoraPlan = LoraPlan()
    learning_rate: Positive = 1e-3
    warmup_steps: Annotated[int, Meta(ge=0)] = 0
    schedule: Schedule = "linear"
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Real = 0.0
    clip_norm: Real = 1.0
    seed: int = 0
    members: Annotated[tuple[Name, ...], Meta(max_length=4096)] = ()

    def __post_init__(self) -> None:
        """Raises `ValueError` for members that are not as many as the silos, or not in order."""
        if self.members and len(self.members) != self.silos:
            raise ValueError(f"{len(self.members)} members are named, and it is for {self.silos} silos")
        if any(one >= other for one, other in pairwise(self.members)):
            raise ValueError("members must be sorted, each named once")

    def rate_at(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0.

        Same curves as `transformers.get_scheduler` with `num_training_steps=steps`.
        """
        if step < self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        left = max(1, self.steps - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / left)
        if self.schedule == "linear":
            return self.learning_rate * (1.0 - done)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


def checked_plan(**fields: object) -> RunPlan:
    """A plan from command-line values. Raises `UsageError` naming the field that is out of range."""
    try:
        return msgspec.convert(fields, RunPlan)
    except msgspec.ValidationError as error:
        raise UsageError(f"this run cannot be: {error}") from None


class ModelCard(Struct, frozen=True, forbid_unknown_fields=True):
    """Which model a side holds.

    `fingerprint` covers the architecture and every tensor's name; `samples` maps a block's index
    to a digest over a sample of its weights. Sides whose fingerprints differ, or whose samples
    differ on a block that both can read, hold different models.
    """

    name: ModelName
    fingerprint: Name
    blocks: Annotated[int, Meta(ge=1, le=4096)]
    hidden: Annotated[int, Meta(ge=1, le=1 << 20)]
    samples: dict[int, Name] = {}

    def differs_from(self, other: "ModelCard") -> str:
        """Why the two are not one model; empty if nothing speaks against it."""
        if self.fingerprint != other.fingerprint:
            return "their architectures or tensors differ"
        both = self.samples.keys() & other.samples.keys()
        wrong = sorted(i for i in both if self.samples[i] != other.samples[i])
        return f"their weights differ, first in block {wrong[0]}" if wrong else ""
