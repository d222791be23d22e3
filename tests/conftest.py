"""Shared fixtures: tiny random models of every architecture, each built once per session."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from broker.parcel import Parcel
    from workers.checkpoint import Checkpoint
    from workers.service import TrunkService
    from workers.span import Span

# A slow shared runner is not a failure, and no test leaves a database of examples behind.
settings.register_profile("trunkline", settings(), deadline=None, database=None)
settings.load_profile("trunkline")

# Idle OpenMP threads that spin make a suite with several processes an order of magnitude slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

REPOSITORY = Path(__file__).resolve().parents[1]

BLOCKS = 4
WINDOW = 6
"""Sliding window, smaller than the sequences of every test that compares models."""

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "attention_dropout": 0.5,  # on only where something forgets to turn it off
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "gemma": ("gemma", {"head_dim": 12}),
    "gemma2": ("gemma2", {"head_dim": 12, "sliding_window": WINDOW, "query_pre_attn_scalar": 12}),
    "gemma3_text": (
        "gemma3_text",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": WINDOW,
            "tie_word_embeddings": False,
            # Neither a prefix of itself nor the same from any two cuts.
            "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        },
    ),
    "olmo2": ("olmo2", {}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.1,
            "tie_word_embeddings": False,
        },
    ),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
}
"""Name to model type and what its configuration adds to `COMMON`."""


@dataclass(frozen=True)
class TinyModel:
    """A model directory, the whole model as transformers runs it, and the checkpoint to split."""

    path: Path
    whole: "PreTrainedModel"
    checkpoint: "Checkpoint"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The project's directory, from which a subprocess can import its packages."""
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., "PreTrainedConfig"]:
    """`tiny_config(name, **changes)`: the configuration of a 4-block model, hidden size 32."""

    def make(name: str, **changes: Any) -> "PreTrainedConfig":
        from transformers import AutoConfig

        kind, extra = MODELS[name]
        return AutoConfig.for_model(kind, **{**COMMON, **extra, **changes})

    return make


@pytest.fixture(scope="session")
def random_model() -> Callable[..., "PreTrainedModel"]:
    """`random_model(config, seed)`: every parameter drawn anew, so that no norm or bias is trivial."""

    def make(config: "PreTrainedConfig", seed: int = 0) -> "PreTrainedModel":
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        # A tied model with large embeddings repeats its last token for ever, whatever its blocks do.
        embeddings = 0.05 if config.tie_word_embeddings else 0.3
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                weight.add_(0.2 * noise)
            else:
                weight.copy_(noise * (embeddings if "embed" in name else 1.5 * weight.shape[1] ** -0.5))
        return model

    return make


@pytest.fixture(scope="session")
def tiny_model(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., "PreTrainedConfig"],
    random_model: Callable[..., "PreTrainedModel"],
) -> Callable[[str], TinyModel]:
    """`tiny_model(name)`: a random 4-block model, by the name of its family or a variant."""
    built: dict[str, TinyModel] = {}

    def get(name: str) -> TinyModel:
        if name not in built:
            from transformers import AutoModelForCausalLM

            from workers.checkpoint import Checkpoint

            path = tmp_path_factory.mktemp(name)
            random_model(tiny_config(name)).save_pretrained(path)
            whole = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
            whole.eval().requires_grad_(False)
            built[name] = TinyModel(path, whole, Checkpoint(str(path)))
        return built[name]

    return get


@pytest.fixture(scope="session")
def split() -> Callable[..., tuple["Span", "Span", "Span"]]:
    """`split(checkpoint, head, tail)`: head, trunk and tail, a tied lm_head shared by the ends."""

    def make(checkpoint: "Checkpoint", head: int, tail: int, **options: Any) -> tuple["Span", "Span", "Span"]:
        from codec.partition import Partition
        from workers.span import Span

        first, middle, last = Partition(head, tail).spans(checkpoint.blocks)
        front = Span(checkpoint, first, embeds=True, **options)
        trunk = Span(checkpoint, middle, **options)
        return front, trunk, Span(checkpoint, last, predicts=True, tied=front, **options)

    return make


def _handle(service: "TrunkService", parcels: "Sequence[Parcel]") -> "list[Parcel]":
    from workers.inbound import open_up
    from workers.replies import encoded

    for parcel in parcels:
        service.add(open_up(parcel, service.trunk))
    answers: list[Parcel] = []
    while True:
        replies = service.next_pass(time.monotonic())
        answers += map(encoded, replies or ())
        if replies is None:
            due = service.wait(time.monotonic())
            if due is None and not service.runs.saver.pending:
                return answers
            time.sleep(due or 1e-3)


@pytest.fixture(scope="session")
def handle() -> "Callable[[TrunkService, Sequence[Parcel]], list[Parcel]]":
    """Everything that messages cause at a service, as a worker's threads would have it, one by one."""
    return _handle
