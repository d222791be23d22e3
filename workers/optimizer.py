"""The optimizer of one part of a model: the trunk's adapter on a worker, the ends' on a silo.

All parts take the same step: gradients of the *summed* loss are accumulated everywhere, then all
are divided by one divisor and scaled by one clip factor that depend on every part.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from codec.errors import MismatchError
from codec.plan import RunPlan

_VALUE = "value:"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What torch's AdamW keeps for each parameter that had a gradient."""


def clip_factor(plan: RunPlan, norm: float) -> float:
    """What `torch.nn.utils.clip_grad_norm_` would scale a gradient of this norm by; at most 1."""
    return min(1.0, plan.clip_norm / (norm + 1e-6)) if plan.clip_norm else 1.0


class PartOptimizer:
    """AdamW over named adapter tensors, with the run's schedule."""

    def __init__(self, plan: RunPlan, parameters: Mapping[str, Tensor]) -> None:
        self._plan = plan
        self.parameters = dict(parameters)
        self._adamw = None
        if parameters:
            self._adamw = torch.optim.AdamW(
                list(parameters.values()),
                lr=plan.learning_rate,
                betas=plan.betas,
                eps=plan.eps,
                weight_decay=plan.weight_decay,
            )

    def square_norm(self) -> float:
        """Squared norm of the accumulated gradient, summed in double precision."""
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        return math.fsum(float(g.double().pow(2).sum()) for g in grads)

    def gradients(self) -> dict[str, Tensor]:
        """The accumulated gradients by name, zero where nothing flowed."""
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.parameters.items()
        }

    def replace_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Set the gradients, as summed over silos with shared ends."""
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name].to(parameter)

    def drop_gradients(self) -> None:
        """Forget what was accumulated: the step begins anew."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Copies of the parameters and of AdamW's moments and counters, to go on from with `restore`."""
        copies = {f"{_VALUE}{name}": p.detach().clone() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            moments = self._adamw.state.get(parameter, {}) if self._adamw else {}
            copies |= {f"{kind}:{name}": value.detach().clone() for kind, value in moments.items()}
        return copies

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Stand where `state` was taken, without gradients. Raises `MismatchError` if it does not fit."""
        for name, parameter in self.parameters.items():
            value = state.get(f"{_VALUE}{name}")
            if value is None or value.shape != parameter.shape:
                raise MismatchError(f"the saved state has no {name} of {tuple(parameter.shape)}")
        self.drop_gradients()
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state[f"{_VALUE}{name}"])
            assert self._adamw is not None
            self._adamw.state.pop(parameter, None)
            if f"{_MOMENTS[0]}:{name}" in state:
                moments = {kind: state[f"{kind}:{name}"].clone() for kind in _MOMENTS}
                # The counter stays on the CPU, as AdamW keeps it.
                moments |= {kind: moments[kind].to(parameter.device) for kind in _MOMENTS[1:]}
                self._adamw.state[parameter] = moments

    def step(self, number: int, divisor: float, clip: float) -> None:
        """Take optimizer step `number` (from 0) on gradients divided by `divisor`, times `clip`."""
        if self._adamw is None:
            return
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.div_(divisor).mul_(clip)
        for group in self._adamw.param_groups:
            group["lr"] = self._plan.rate_at(number)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
