"""What the hidden states that a silo sends amount to as (epsilon, delta).

The unit is one sequence: two silos are neighbours if one of their sequences is another one of the same
length. Each vector that leaves the head has an L2 norm of at most C before Gaussian noise of absolute
strength, so a vector that depends on the sequence moves by at most 2C; of all vectors ever sent, those are
counted. The noise on n of them is the Gaussian mechanism once, of sensitivity 2C√n: sending a sequence of T
tokens k times is n = k·T, and releases need no other composition. What that is in epsilon and delta is
`dp_accounting`'s to say (Balle and Wang 2018, exact).

It covers hidden states at the head, and nothing else that crosses: docs/privacy.md.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from codec.errors import UsageError
from silo_agent.microbatch import MicroBatch
from silo_agent.noise import NoiseScale

_ROUNDING = 1e-9
"""The library's search ends this near: noise is rounded up, so that no more is spent than was asked for."""


def _library() -> Any:
    try:
        import dp_accounting
    except ImportError:
        raise UsageError(
            "--delta needs the package dp-accounting", hint="Install it: pip install 'trunkline[dp]'."
        ) from None
    return dp_accounting


def epsilon_of(scale: NoiseScale, vectors: int, delta: float) -> float:
    """The least epsilon at `delta` where `vectors` vectors depend on one sequence; infinite without noise.

    `scale` is clipped and absolute. Raises `UsageError` where the library is missing.
    """
    sensitivity = 2 * scale.clip * math.sqrt(vectors)
    if not sensitivity:
        return 0.0
    return float(_library().get_epsilon_gaussian(scale.sigma(0.0) / sensitivity, delta))


def sigma_for(clip: float, vectors: int, epsilon: float, delta: float) -> float:
    """The least standard deviation with which `vectors` vectors spend `epsilon`; the inverse of the above."""
    multiplier = float(_library().get_sigma_gaussian(epsilon, delta)) * (1 + _ROUNDING)
    return multiplier * 2 * clip * math.sqrt(vectors)


def exposures(steps: Iterable[Sequence[MicroBatch]], *, trains_head: bool) -> list[int]:
    """After each step, how many of all vectors sent may depend on one sequence: on the worst one.

    Those of a head that is not trained depend on their own sequence only. One that is trained has learned
    from all sequences of the steps before, without noise: every vector after that depends on each of them.
    Equal sequences count as one.
    """
    counts: dict[bytes, int] = {}
    found = []
    for step in steps:
        own: dict[bytes, int] = {}
        for batch in step:
            for ids in batch.ids.split(batch.lengths):
                key = ids.numpy().tobytes()
                own[key] = own.get(key, 0) + len(ids)
        everything = sum(own.values())
        if trains_head:
            own = {**own, **dict.fromkeys(counts, everything)}
        for key, vectors in own.items():
            counts[key] = counts.get(key, 0) + vectors
        found.append(max(counts.values(), default=0))
    return found


@dataclass(frozen=True, slots=True)
class Account:
    """What a run spends: noise of `scale`, and after each step the `vectors` that depend on one sequence.

    A step that is done again sends the same bytes: it is spent once.
    """

    scale: NoiseScale
    delta: float
    vectors: tuple[int, ...]

    def epsilon(self, steps: int) -> float:
        """Spent when so many steps are done or begun."""
        return epsilon_of(self.scale, self.vectors[steps - 1], self.delta) if steps else 0.0

    def steps_within(self, budget: float) -> int:
        """How many steps spend no more than `budget`. What is spent never falls: found by bisection."""
        low, high = 0, len(self.vectors)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.epsilon(middle) <= budget else (low, middle - 1)
        return low

    def report(self, steps: int) -> dict[str, float | int]:
        """For a JSON file: what so many steps have spent, and of what."""
        return {
            "epsilon": self.epsilon(steps),
            "delta": self.delta,
            "clip": self.scale.clip,
            "sigma": self.scale.sigma(0.0),
            "vectors": self.vectors[steps - 1] if steps else 0,
        }


@dataclass(frozen=True, slots=True)
class Wish:
    """`epsilon` asks for noise that spends it in all planned steps, `budget` to stop before more is spent."""

    delta: float | None
    epsilon: float | None = None
    budget: float | None = None

    def account(
        self,
        scale: NoiseScale,
        seed: int | None,
        steps: Iterable[Sequence[MicroBatch]],
        *,
        trains_head: bool,
    ) -> Account | None:
        """The account of a run of such `steps`, with the noise to use; None where none is asked for.

        Raises `UsageError` for a wish that cannot be met.
        """
        if self.delta is None:
            if self.epsilon is not None or self.budget is not None:
                raise UsageError("--epsilon and --budget need --delta")
            return None
        check_accountable(scale, seed, self.delta, noisy=self.epsilon is None)
        if any(wish is not None and not 0 < wish < math.inf for wish in (self.epsilon, self.budget)):
            raise UsageError("--epsilon and --budget are numbers above 0")
        vectors = tuple(exposures(steps, trains_head=trains_head))
        if self.epsilon is not None:
            if scale.absolute or scale.mean_abs:
                raise UsageError("--epsilon chooses the noise itself", hint="Or give --budget instead.")
            sigma = sigma_for(scale.clip, vectors[-1], self.epsilon, self.delta)
            scale = dataclasses.replace(scale, absolute=sigma)
        account = Account(scale, self.delta, vectors)
        if self.last_step(account) == 0:
            raise UsageError(
                f"the first step alone spends ε = {account.epsilon(1):.4g}, over the budget",
                hint="More noise, a lower --noise-clip or shorter sequences spend less.",
            )
        return account

    def last_step(self, account: Account) -> int:
        """How many of the account's steps may be done."""
        return len(account.vectors) if self.budget is None else account.steps_within(self.budget)


def check_accountable(scale: NoiseScale, seed: int | None, delta: float, *, noisy: bool = True) -> None:
    """Raises `UsageError` for what no account can be given of: `noisy`, if it has no noise either."""
    if not 0 < delta < 1:
        raise UsageError(
            f"--delta {delta:g} is not between 0 and 1", hint="Far below one over the sequences."
        )
    if not scale.clip:
        raise UsageError("without --noise-clip nothing bounds what a sequence moves: no epsilon follows")
    if scale.relative:
        raise UsageError(
            "--noise is measured on the data, and no epsilon follows from it", hint="Give --noise-abs."
        )
    if noisy and scale.sigma(0.0) == 0:
        raise UsageError("without noise no epsilon is finite", hint="Give --noise-abs.")
    if seed is not None:
        raise UsageError("who knows --noise-seed takes the noise off: no epsilon follows from it")
    _library()


def said(epsilon: float, delta: float, unit: str) -> str:
    """The statement, and how far it reaches."""
    return (
        f"hidden states at the head: ε = {epsilon:.4g} at δ = {delta:g} for {unit} (replaced by any of the "
        "same length). Lengths, counters and, in training, gradients cross too and are not covered."
    )
