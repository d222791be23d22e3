"""The frozen linear layers of a span: the fastest kernel there is, and one product for neighbours.

Queries, keys and values are linear in the same input, gate and up in another. Their weights are laid
one after another in one buffer, of which each layer's own weight is a view: the first of them to be
called computes the product for all, and each takes its columns. No weight is held twice.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_NEIGHBOURS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_onednn: Any = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None


def freeze_linears(model: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Make every linear layer of `model`, still without weights, a `FrozenLinear`, and fuse neighbours.

    Returns the room for each fused weight and bias by its name: whoever loads the model must copy them
    there. Read elsewhere and laid together afterwards, they would take their memory twice for a while.
    """
    room: dict[str, Tensor] = {}
    for module in list(model.modules()):
        if type(module) is nn.Linear:
            module.__class__ = FrozenLinear
    for path, module in model.named_modules():
        for names in _NEIGHBOURS:
            members = [getattr(module, name, None) for name in names]
            if all(isinstance(member, FrozenLinear) for member in members):
                parts = _fuse(cast("list[FrozenLinear]", members), dtype, device)
                room |= {f"{path}.{names[place]}.{kind}": part for (place, kind), part in parts.items()}
    return room


class FrozenLinear(nn.Linear):
    """`nn.Linear` whose weights get no gradient; its input does."""

    neighbours: "_Neighbours | None" = None
    place: int = 0

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        if self.neighbours is not None:
            return self.neighbours.take(self.place, input)
        return _product(input, self.weight, self.bias, (self.out_features,))[0]


class _Neighbours:
    """Layers with one input. What the last input gave is kept until each of them took its share."""

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> None:
        self._weight, self._bias, self._sizes = weight, bias, tuple(sizes)
        self._input: Tensor | None = None
        self._shares: dict[int, Tensor] = {}

    def take(self, place: int, input: Tensor) -> Tensor:
        """The columns of layer `place`."""
        if self._input is not input or place not in self._shares:
            product = _product(input, self._weight, self._bias, self._sizes)
            self._input, self._shares = input, dict(enumerate(product))
        share = self._shares.pop(place)
        if not self._shares:
            self._input = None
        return share


def _fuse(
    members: Sequence[FrozenLinear], dtype: torch.dtype, device: torch.device
) -> dict[tuple[int, str], Tensor]:
    """One buffer for all weights and one for all biases; the members' parts of them."""
    inputs = {member.in_features for member in members}
    biased = {member.bias is not None for member in members}
    if len(inputs) > 1 or len(biased) > 1:
        return {}
    sizes = [member.out_features for member in members]
    weight = torch.empty(sum(sizes), *inputs, dtype=dtype, device=device)
    bias = torch.empty(sum(sizes), dtype=dtype, device=device) if True in biased else None
    neighbours = _Neighbours(weight, bias, sizes)
    for place, member in enumerate(members):
        member.neighbours, member.place = neighbours, place
    whole = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return {(i, kind): part for kind, buffer in whole.items() for i, part in enumerate(buffer.split(sizes))}


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """`x @ weight.T + bias`, its columns apart by `sizes`."""
    if x.requires_grad and torch.is_grad_enabled():
        apply = cast("Callable[..., tuple[Tensor, ...]]", _Product.apply)
        return apply(x, weight, bias, sizes)
    return _columns(_multiply(x, weight, bias), sizes)


class _Product(torch.autograd.Function):
    """The product with its gradient for `x`: oneDNN's has none, and the columns' would be added up."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weight)
        return _columns(_multiply(x, weight, bias), sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        grad = grads[0] if len(grads) == 1 else torch.cat(grads, -1)
        return _multiply(grad, weight.t(), None), None, None, None


def _columns(product: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return (product,) if len(sizes) == 1 else tuple(product.split_with_sizes(list(sizes), -1))


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # In fp32 torch takes MKL, which is half as fast as oneDNN on CPUs that are not Intel's.
    if _onednn is not None and x.device.type == "cpu" and x.dtype == torch.float32:
        return cast("Tensor", _onednn(x, weight, bias, "none", [], ""))
    return F.linear(x, weight, bias)
