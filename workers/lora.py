"""LoRA on a span, in PEFT's own layers, with names and first values that no partition changes.

A tensor is known by its name in the unsplit model, `model.layers.7.self_attn.q_proj.lora_A.weight`;
what PEFT's files add to that is left to `silo_agent.adapters`.
"""

import hashlib
import math
from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from codec import partition
from codec.errors import MismatchError
from codec.plan import LoraPlan
from workers.adapted import AdaptedLinear
from workers.families import check_targets
from workers.span import Span


def peft_config(plan: LoraPlan) -> LoraConfig:
    """The plan as PEFT's configuration."""
    return LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,  # type: ignore[arg-type]  # declared int, used as a float
        target_modules=list(plan.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def add_adapter(
    span: Span,
    key: str,
    plan: LoraPlan,
    seed: int,
    blocks: partition.Span | None = None,
    initial: Mapping[str, Tensor] | None = None,
) -> None:
    """Add adapter `key` to every target layer of the span, or of its part `blocks`.

    It starts with the values `initial`, by global name, or as a no-op (B is zero). A starts as PEFT
    starts it (Kaiming uniform), drawn per tensor from `seed` and the tensor's global name, so that every
    partition of a run begins with the same adapter. Weights are fp32.

    Raises `MismatchError` if `initial` does not fit; nothing is left behind then.
    """
    check_targets(span.model.config, plan.targets)
    span.adapters.add(key)
    # The layers alone: given the model, PEFT would look for embeddings that this span may not have.
    layers = span.layers(blocks)
    if not len(layers):
        return
    config = peft_config(plan)
    layer = cast("type[nn.Module]", partial(AdaptedLinear, routing=span.routing))
    config._register_custom_module({nn.Linear: layer})
    inject_adapter_in_model(config, layers, adapter_name=key)
    del layers.peft_config  # PEFT would take the next adapter for a mistake.
    weights = adapter_tensors(span, key)
    for weight in weights.values():
        weight.data = weight.data.to(torch.float32)
    if initial is None:
        _draw(weights, seed)
    else:
        try:
            load_adapter(span, key, initial)
        except MismatchError:
            drop_adapter(span, key)
            raise
    _train_all(span)


def adapter_bytes(span: Span, plan: LoraPlan, blocks: partition.Span) -> int:
    """What the weights of an adapter would take. Raises `ModelError` for targets that are not there."""
    check_targets(span.model.config, plan.targets)
    named = span.layers(blocks).named_modules()
    targets = [module for name, module in named if name.rpartition(".")[2] in plan.targets]
    bases = [module.base_layer if isinstance(module, AdaptedLinear) else module for module in targets]
    return sum(4 * plan.rank * sum(base.weight.shape) for base in cast("list[nn.Linear]", bases))


def _draw(weights: Mapping[str, Tensor], seed: int) -> None:
    for name, weight in weights.items():
        if ".lora_B." in name:
            nn.init.zeros_(weight)
        else:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            first = torch.empty(weight.shape)
            nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)
            weight.data.copy_(first)


def drop_adapter(span: Span, key: str) -> None:
    """Remove adapter `key` and its memory."""
    for layer in _layers(span):
        layer.set_adapter([])  # PEFT would warn that it puts another one in the place of one in use.
        layer.delete_adapter(key)
    span.adapters.discard(key)
    _train_all(span)


def adapter_tensors(span: Span, key: str) -> dict[str, Tensor]:
    """The adapter's weights by global name: A is `[rank, in]`, B `[out, rank]`."""
    found: dict[str, Tensor] = {}
    for name, parameter in span.model.named_parameters():
        left, marker, right = name.rpartition(f".{key}.")
        if marker and "lora_" in left:
            full = left if left.startswith("model.") else f"model.{left}"
            found[span.global_name(f"{full}.{right}")] = parameter
    return found


def load_adapter(span: Span, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy values into adapter `key`. Raises `MismatchError` if a tensor is missing or misshapen."""
    weights = adapter_tensors(span, key)
    for name, weight in weights.items():
        value = tensors.get(name)
        if value is None or value.shape != weight.shape:
            found = "is missing" if value is None else f"is {tuple(value.shape)}"
            raise MismatchError(
                f"adapter tensor {name} {found}, {tuple(weight.shape)} was expected",
                hint="Was the adapter trained on this model with this rank and these targets?",
            )
    for name, weight in weights.items():
        weight.data.copy_(tensors[name])


def _layers(span: Span) -> list[AdaptedLinear]:
    return [module for module in span.model.modules() if isinstance(module, AdaptedLinear)]


def _train_all(span: Span) -> None:
    # PEFT freezes what it does not select; a graph in flight would then lose gradients silently.
    for layer in _layers(span):
        for weights in (layer.lora_A, layer.lora_B):
            weights.requires_grad_(True)
