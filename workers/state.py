"""What is saved of a run, and where: the state from which any worker can go on with it.

A run has a directory of its own, named by a digest of its ticket. In it lie the last two generations
of its state, `state-EPOCH-NUMBER`, and one empty file for each home that it had, `epoch-EPOCH`.

A home owns the run while its epoch is the last one claimed. It looks for later ones after each write
and before anybody hears of it; who takes over claims first and reads then. So what a fenced home wrote
last was either read by its successor, or nobody was told of it.
"""

import hashlib
from dataclasses import dataclass

from msgspec import Struct
from torch import Tensor

from codec.errors import SaveError, TrunklineError, UnavailableError
from codec.messages import Block, Committed, Count, Names
from codec.plan import Name, RunPlan
from workers.place import Place, place_at
from workers.sealed import seal, unseal

_KEPT = 2
_EPOCH, _STATE = "epoch-", "state-"


class RunState(Struct, frozen=True, forbid_unknown_fields=True):
    """A run between two steps. Its tensors are the trunk's adapter, the optimizer's, and `summed`'s.

    `first` is a digest of the first adapter, `seats` are digests of its members' seats. `last` answers
    the commits of the step before `step`, with the ends' summed gradients called `summed`.
    """

    run: Name
    fingerprint: Name
    start: Block
    stop: Block
    plan: RunPlan
    step: Count
    first: bytes
    seats: tuple[bytes, ...]
    last: Committed | None = None
    summed: Names = ()


Tensors = dict[str, Tensor]


class Tenure:
    """One home's right to save a run's state. Used from one thread."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._epoch = self._number = 0

    def claim(self) -> None:
        """Own the run from here on, whoever did before. Raises what the place raises."""
        while True:
            self._epoch = _last_epoch(self._place.names()) + 1
            if self._place.claim(f"{_EPOCH}{self._epoch:08}"):
                return

    def save(self, state: RunState, tensors: Tensors) -> None:
        """Make a state durable, and keep the one before it. The first time, claim the run.

        Raises `UnavailableError` if another home has claimed it since, and what the place raises.
        """
        if not self._epoch:
            self.claim()
        self._number += 1
        self._place.write(f"{_STATE}{self._epoch:08}-{self._number:012}", seal(state, tensors))
        names = self._place.names()
        if _last_epoch(names) != self._epoch:
            raise UnavailableError(f"another worker has taken over run {state.run!r}", hint="Join it again.")
        for name in _generations(names)[_KEPT:]:
            self._place.remove(name)

    def discard(self) -> None:
        """The run is over: nothing of it is kept, unless another home has claimed it since."""
        if _last_epoch(self._place.names()) == self._epoch:
            self._place.clear()


@dataclass(frozen=True, slots=True)
class Found:
    """A run as it was saved, and the right to go on with it."""

    tenure: Tenure
    state: RunState
    tensors: Tensors


class StateStore:
    """The states of many runs below one place."""

    def __init__(self, place: Place) -> None:
        self._place = place

    @classmethod
    def at(cls, url: str) -> "StateStore":
        """Below a directory or an fsspec URL. Raises `UsageError` for an unknown protocol."""
        return cls(place_at(url))

    def tenure(self, ticket: bytes) -> Tenure:
        """For the home of a run with this secret ticket; nothing is claimed or written yet."""
        return Tenure(self._place.at(hashlib.blake2b(ticket, digest_size=16).hexdigest()))

    def load(self, ticket: bytes) -> Found:
        """Claim a run and read its newest state that is whole.

        Raises `UnavailableError` if there is none, `SaveError` if none is whole, and what the place raises.
        """
        tenure = self.tenure(ticket)
        place = tenure._place
        if not _generations(place.names()):
            raise UnavailableError(
                "this worker has no state of the run",
                hint="Start all its workers with the same --state. Of a run that is over nothing is kept.",
            )
        tenure.claim()
        trouble: TrunklineError | OSError | None = None
        for name in _generations(place.names()):
            try:
                return Found(tenure, *unseal(place.read(name), RunState))
            except (SaveError, FileNotFoundError) as error:
                trouble = trouble or error
        raise SaveError(f"no state of the run can be read: {trouble}", side="worker")


def _generations(names: list[str]) -> list[str]:
    """The states among the names, the newest first."""
    return sorted((n for n in names if n.startswith(_STATE) and n[-1].isdigit()), reverse=True)


def _last_epoch(names: list[str]) -> int:
    return max((int(n.removeprefix(_EPOCH)) for n in names if n.startswith(_EPOCH)), default=0)
