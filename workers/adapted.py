"""A linear layer with LoRA of many owners: each range of a pass's tokens gets its own adapter.

PEFT's layer holds the weights, under PEFT's names; only its forward is ours. PEFT's would apply one
adapter to all tokens, chosen beforehand for the whole process.

Shape letters: T packed tokens, K shares, M tokens of one share, I inputs, O outputs, R rank.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor

from workers.routing import Routing, Share

_MANY = 8
"""Shares of one token from which one batched product beats a product for each; longer ones always do."""


class AdaptedLinear(Linear):
    """PEFT's LoRA layer, whose adapters `routing` chooses."""

    def __init__(self, *arguments: Any, routing: Routing, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._routing = routing

    def forward(self, x_1TI: Tensor) -> Tensor:
        """`[1, T, O]` in the dtype of the base; adapters compute in their own, fp32."""
        base: Tensor = self.base_layer(x_1TI)
        shares = self._routing.shares
        owned = [share for share in shares if share.adapter is not None and share.adapter in self.lora_A]
        if not owned:
            return base
        x_TI = x_1TI[0].to(self._weight("A", owned[0]).dtype)
        if len(shares) == 1:
            delta = self._one(x_TI, shares[0])
        else:
            found = dict(zip(owned, self._each(x_TI, owned), strict=True))
            delta = torch.cat([found[s] if s in found else self._nothing(x_TI, s) for s in shares])
        return (base + delta).to(base.dtype)

    def _one(self, x_MI: Tensor, share: Share) -> Tensor:
        a_RI, b_OR = self._weight("A", share), self._weight("B", share)
        return F.linear(F.linear(x_MI, a_RI), b_OR) * self._scale(share)

    def _each(self, x_TI: Tensor, owned: Sequence[Share]) -> Sequence[Tensor]:
        inputs = [x_TI[share.start : share.stop] for share in owned]
        length = len(inputs[0])
        if (
            len(owned) >= (_MANY if length == 1 else 2)
            and all(len(x_MI) == length for x_MI in inputs)
            and len({len(self._weight("A", share)) for share in owned}) == 1
        ):
            return self._batched(torch.stack(inputs), owned)
        return [self._one(x_MI, share) for x_MI, share in zip(inputs, owned, strict=True)]

    def _batched(self, x_KMI: Tensor, owned: Sequence[Share]) -> Sequence[Tensor]:
        a_KRI = torch.stack([self._weight("A", share) for share in owned])
        b_KOR = torch.stack([self._weight("B", share) for share in owned])
        scale_K11 = x_KMI.new_tensor([self._scale(share) for share in owned])[:, None, None]
        return torch.bmm(torch.bmm(x_KMI, a_KRI.mT), b_KOR.mT).mul(scale_K11).unbind()

    def _nothing(self, x_TI: Tensor, share: Share) -> Tensor:
        return x_TI.new_zeros(share.stop - share.start, cast("int", self.out_features))

    def _weight(self, side: Literal["A", "B"], share: Share) -> Tensor:
        layers = self.lora_A if side == "A" else self.lora_B
        return cast("Tensor", layers[cast("str", share.adapter)].weight)

    def _scale(self, share: Share) -> float:
        return float(self.scaling[cast("str", share.adapter)])
