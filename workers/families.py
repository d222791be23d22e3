"""Which architectures can be split, and the few facts in which they differ.

A family works through transformers' own classes; nothing here copies a model. What a span needs
to know: the linear layers LoRA adapts by default, and the configuration of a slice of blocks.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from codec.errors import ModelError
from codec.partition import Span
from workers.attention import IMPLEMENTATION

_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture: names of its attention and MLP linear layers."""

    attention: tuple[str, ...] = _QKVO
    mlp: tuple[str, ...] = _MLP


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "phi3": Family(attention=("qkv_proj", "o_proj"), mlp=("gate_up_proj", "down_proj")),
    "gemma": Family(),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "olmo2": Family(),
    "granite": Family(),
}

_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model's configuration. Raises `ModelError` for an unsupported one."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"architecture {config.model_type!r} cannot be split yet",
            hint=f"These can: {', '.join(FAMILIES)}.",
        )
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ModelError(
            f"the weights are quantised ({method}), and would be read without their scales",
            hint="Use the model's unquantised variant.",
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {r.get("rope_type") for r in rope.values() if isinstance(r, dict)}
    if found := kinds & _BATCH_DEPENDENT_ROPE:
        raise ModelError(
            f"rope type {found.pop()!r} lets the longest sequence of a batch change the others' "
            "positions, which packed batches of several silos cannot allow",
            hint="Use the model's variant with a fixed context length.",
        )
    return family


def lora_targets(config: PreTrainedConfig, choice: str) -> tuple[str, ...]:
    """Names of the layers to adapt: `attention`, `all` (with the MLP), or a comma-separated list."""
    family = family_of(config)
    if choice == "attention":
        return family.attention
    if choice == "all":
        return family.attention + family.mlp
    names = tuple(part.strip() for part in choice.split(","))
    check_targets(config, names)
    return names


def check_targets(config: PreTrainedConfig, names: Sequence[str]) -> None:
    """Raises `ModelError` unless every name is a linear layer of the family's blocks."""
    family = family_of(config)
    known = family.attention + family.mlp
    hint = f"It has {', '.join(known)}."
    if not names:
        raise ModelError("an adapter must adapt at least one linear layer", hint=hint)
    if unknown := [name for name in names if name not in known]:
        raise ModelError(f"{config.model_type} has no linear layer {unknown[0]!r}", hint=hint)


def span_config(config: PreTrainedConfig, span: Span, *, embeds: bool) -> PreTrainedConfig:
    """The configuration of blocks `[start, stop)` alone, `embeds` if they follow the embeddings."""
    sliced = copy.deepcopy(config)
    sliced.num_hidden_layers = len(span)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        # A list left at full length is silently read from its start: wrong windows, no error.
        sliced.layer_types = list(layer_types[span.start : span.stop])
    if not embeds and hasattr(sliced, "embedding_multiplier"):
        sliced.embedding_multiplier = 1.0  # Granite scales its input; a later span's is scaled already.
    sliced._attn_implementation = IMPLEMENTATION
    return sliced
