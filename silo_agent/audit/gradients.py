"""The labels, from the gradient that crosses: which positions bear loss, and what is learned there.

That the gradient of cross-entropy names the label is Zhao et al.'s (iDLG, arXiv 2001.02610), and that a
split model sends it away Liu et al.'s (arXiv 2203.05222). Behind the trunk's output h, which the worker
computed itself, stand the public tail and a sum of cross-entropies. So the gradient at h is known but for
the gradients s at the lm_head's input, and linear in them:

    gradient = Jᵀ s,   J = du/dh at the known h,   s = E[w | model] - w(label), or 0 without loss.

The system is solved for s at all positions together (conjugate gradients on the normal equations, Hestenes
and Stiefel), and each label read from E[w | model] - s: the row w of the lm_head that has its direction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from silo_agent.audit.attack import NO_GUESS, About, Knowledge, Seen
from silo_agent.audit.plain import PlainTail

_BEARS_LOSS = 1e-2
"""Of the greatest gradient's norm: with less, what is learned was known to the model anyway."""

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Gradients:
    """Solves for the lm_head's gradients in at most `steps` steps."""

    steps: int = 60
    name: str = "gradients"
    about: About = "labels"
    assumes: str = "public tail, trunk's output"

    def guess(self, knowledge: Knowledge, seen: Sequence[Seen]) -> list[Tensor]:
        """The token behind each position that bears loss; no guess elsewhere."""
        tail = PlainTail(knowledge.model, knowledge.model.tail.blocks).requires_grad_(False)
        return [self._labels(tail, text.output.float(), text.gradient) for text in seen]

    def _labels(self, tail: PlainTail, output: Tensor, gradient: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        # Only the plain kernel of attention has a second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            given, logits = tail(leaf, (len(leaf),))
            (expected,) = torch.autograd.grad(logits.logsumexp(1).sum(), given, retain_graph=True)
            back, forth = _products(given, leaf)
            slopes = least_squares(back, forth, gradient.to(leaf), self.steps)
        norms = slopes.norm(dim=1)
        likeness = F.normalize(expected - slopes, dim=1) @ F.normalize(tail.vocabulary, dim=1).T
        labels = likeness.argmax(1).masked_fill(norms <= _BEARS_LOSS * norms.max(), NO_GUESS)
        return torch.cat((torch.tensor([NO_GUESS]), labels[:-1].cpu()))


def _products(outcome: Tensor, leaf: Tensor) -> tuple[Linear, Linear]:
    """Products with the transposed Jacobian of `outcome` by `leaf`, and with the Jacobian itself.

    The first is linear in what it is given, so its own gradient is the second.
    """
    probe = torch.zeros_like(outcome, requires_grad=True)
    (pulled,) = torch.autograd.grad(outcome, leaf, probe, create_graph=True)

    def back(slopes: Tensor) -> Tensor:
        return torch.autograd.grad(outcome, leaf, slopes, retain_graph=True)[0]

    def forth(change: Tensor) -> Tensor:
        return torch.autograd.grad(pulled, probe, change, retain_graph=True)[0]

    return back, forth


def least_squares(product: Linear, transposed: Linear, right: Tensor, steps: int) -> Tensor:
    """The least x with the least `|product(x) - right|`, by at most `steps` conjugate gradients."""
    rest = right.clone()
    slope = transposed(rest)
    found, along, size = torch.zeros_like(slope), slope, slope.square().sum()
    enough = 1e-12 * float(size)
    for _ in range(steps):
        if float(size) <= enough:
            break
        image = product(along)
        length = size / image.square().sum()
        found, rest = found + length * along, rest - length * image
        slope = transposed(rest)
        before, size = size, slope.square().sum()
        along = slope + (size / before) * along
    return found
