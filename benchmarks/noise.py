"""Would noise scaled per channel hurt the model less than one deviation for all, at equal protection?

Protection is what the vocabulary search of docs/privacy.md has to overcome: the distance between the
hidden states of the true token and of the candidate that is hardest to tell from it, prefix known, in
units of the noise (Mahalanobis). For the Gaussian mechanism that distance is all that counts: it is
the parameter μ of Gaussian differential privacy (Dong, Roth and Su, arXiv 1905.02383) between these
two tokens, and the search fails with probability Q(μ / 2). It is proportional to 1 / scale, so two
shapes of noise are made equally strong by scaling one of them.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.parts import Parts
from benchmarks.progress import Progress
from codec.partition import Partition
from silo_agent.ends import Ends
from workers.checkpoint import Checkpoint

_NEAREST = 48
_RANDOM = 207
_PREFIX = 48
SCALES = (0.02, 0.05, 0.1, 0.2)


def measure(
    model: str,
    partition: Partition,
    texts: Sequence[Sequence[int]],
    *,
    positions: int,
    draws: int,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Loss under both shapes at equal protection, for noise of `SCALES` times the boundary's deviation.

    Distances are measured at `positions` places of the texts, losses over `draws` draws of the noise,
    the same normal numbers for both shapes.
    """
    random = torch.Generator().manual_seed(seed)
    parts = Parts(Checkpoint(model), partition, texts)
    with torch.no_grad():
        sent = parts.ends.head.run(parts.ids, parts.lengths, adapter=parts.ends.adapter_key)
    shapes = {"one": sent.std().expand(sent.shape[1]), "channel": sent.std(0)}
    closest: dict[str, list[float]] = {shape: [] for shape in shapes}
    for number in range(positions):
        progress(f"distances, position {number + 1} of {positions}")
        text = texts[number % len(texts)]
        at = int(torch.randint(1, min(len(text), _PREFIX), (), generator=random))
        moves = _moves(parts.ends, text[: at + 1], random)
        for shape, deviation in shapes.items():
            closest[shape].append(float((moves / deviation).norm(dim=1).min()))
    protection = {shape: statistics.median(found) for shape, found in closest.items()}
    exact = parts.loss_from_head(sent)
    rows = []
    for scale in SCALES:
        losses: dict[str, list[float]] = {shape: [] for shape in shapes}
        for draw in range(draws):
            progress(f"losses at {scale}, draw {draw + 1} of {draws}")
            normal = torch.randn(sent.shape, generator=random)
            for shape, deviation in shapes.items():
                # As strong as one deviation of `scale`: the same median distance in units of the noise.
                size = scale * protection[shape] / protection["one"]
                losses[shape].append(parts.loss_from_head(sent + normal * deviation * size))
        for shape in shapes:
            rows.append(
                {
                    "shape": shape,
                    "scale": scale * protection[shape] / protection["one"],
                    "distance": protection["one"] / scale,
                    "loss_change": statistics.mean(losses[shape]) - exact,
                    "loss_change_spread": statistics.pstdev(losses[shape]),
                }
            )
    return {"tokens": len(parts.ids), "loss_exact": exact, "distance_at_scale_1": protection, "rows": rows}


@torch.no_grad()
def _moves(ends: Ends, text: Sequence[int], random: torch.Generator) -> Tensor:
    """How the last token's hidden state moves when a candidate takes its place, `[candidates, hidden]`."""
    embeddings = ends.head.embeddings
    true = text[-1]
    near = (embeddings - embeddings[true]).norm(dim=1).argsort()[1 : _NEAREST + 1].tolist()
    others = torch.randint(len(embeddings), (_RANDOM,), generator=random).tolist()
    candidates = [true, *(c for c in [*near, *others] if c != true)]
    rows = torch.tensor([[*text[:-1], candidate] for candidate in candidates])
    hidden = ends.head.run(rows.reshape(-1), [rows.shape[1]] * len(rows)).view(*rows.shape, -1)[:, -1]
    return hidden[1:] - hidden[0]
