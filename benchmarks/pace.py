"""How long a GPU would take: a timed model of a trunk that this machine cannot run. Pure.

A pass costs `fixed + tokens * each + kv_bytes * byte` in each block that it goes through. The figures come
from the model's size and the card's data sheet, by the derivation written at `_llama_2_7b_h100`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from codec.partition import Span
from codec.plan import ModelCard


@dataclass(frozen=True, slots=True)
class Work:
    """One request's share of a pass: its blocks, new tokens, and tokens whose KV cache is read."""

    blocks: Span
    tokens: int
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of one block: of a pass whatever it holds, of a token each way, of a KV byte read."""

    fixed_s: float
    forward_s: float
    backward_s: float
    kv_byte_s: float


@dataclass(frozen=True, slots=True)
class PacedModel:
    """A model's shape, and its pace. `kv_bytes` are those of one token in one block."""

    name: str
    blocks: int
    hidden: int
    kv_bytes: int
    pace: Pace
    source: str
    """Where the figures come from, for the report."""

    @property
    def card(self) -> ModelCard:
        """What silos and the worker call the model that is not there."""
        name = f"paced {self.name}"
        return ModelCard(name=name, fingerprint=name, blocks=self.blocks, hidden=self.hidden)

    def forward(self, work: Sequence[Work]) -> float:
        """Seconds of one pass: each block's weights are read once for all of `work`."""
        pace = self.pace
        each = sum(
            len(part.blocks) * (part.tokens * pace.forward_s + part.cached * self.kv_bytes * pace.kv_byte_s)
            for part in work
        )
        return _joint(work) * pace.fixed_s + each

    def backward(self, work: Sequence[Work]) -> float:
        """Seconds of one pass back."""
        pace = self.pace
        each = sum(len(part.blocks) * part.tokens * pace.backward_s for part in work)
        return _joint(work) * pace.fixed_s + each


def _joint(work: Sequence[Work]) -> int:
    """How many blocks a pass goes through: it begins at the first and ends after the last."""
    return max(part.blocks.stop for part in work) - min(part.blocks.start for part in work)


def _llama_2_7b_h100() -> PacedModel:
    hidden, intermediate, blocks = 4096, 11008, 32
    # Four attention and three MLP matrices: 202 million a block, 6.5 billion in 32. With embeddings and
    # lm_head, which silos hold, that is the 6.7 billion (13.5 GB in bf16) of the model's name.
    weights = 4 * hidden * hidden + 3 * hidden * intermediate
    bandwidth = 3.35e12  # bytes/s of HBM3, data sheet of the H100 SXM
    achieved = 0.4 * 989e12  # FLOP/s: 40 % of the data sheet's dense bf16, what good training code reaches
    flop = 2 * weights  # a multiplication and an addition per weight and token
    pace = Pace(
        # Every pass reads all weights once: 121 µs a block, 3.9 ms for 32. Real kernels hide part of it
        # behind the matrix products of a large pass; added up, the card is rather too slow than too fast
        # there, and exact in decoding, which waits for nothing else.
        fixed_s=2 * weights / bandwidth,
        # 1.02 µs a block, 33 µs for 32: the products with the weights. Attention scores add 1 % at 500
        # tokens and are left out.
        forward_s=flop / achieved,
        # Frozen weights have no gradient of their own: what flows back costs what went forward. LoRA's
        # gradients are below 1 %, and activations are kept, not computed again.
        backward_s=flop / achieved,
        kv_byte_s=1 / bandwidth,
    )
    source = (
        "Llama-2-7B in bf16 on one H100 SXM: 202 M weights a block read at 3.35 TB/s in every pass, "
        "2 FLOP a weight and token at 40 % of 989 TFLOP/s each way, KV cache read at 3.35 TB/s"
    )
    return PacedModel("llama-2-7b-h100", blocks, hidden, 2 * hidden * 2, pace, source)


_TINY: Final = PacedModel(
    name="tiny",
    blocks=4,
    hidden=16,
    kv_bytes=64,
    pace=Pace(fixed_s=50e-6, forward_s=1e-7, backward_s=1e-7, kv_byte_s=0.0),
    source="made up: 0.2 ms a pass, for what should not wait for compute",
)

PACES: Final[dict[str, PacedModel]] = {paced.name: paced for paced in (_llama_2_7b_h100(), _TINY)}
"""The paces by name."""
