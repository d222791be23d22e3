"""What a silo keeps on disk of an unfinished run, beside the adapter that it will become.

Written before each commit, gradients included. A silo that is killed before its next one is then at the
worker's step, which it does again, or one behind with a commit that it asks for again.
"""

from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct
from torch import Tensor

from codec.errors import MismatchError, SaveError
from codec.partition import Partition, Span
from silo_agent.noise import Moments
from workers.place import Directory
from workers.sealed import seal, unseal

FILE = "unfinished.run"


class Standing(Struct, frozen=True, forbid_unknown_fields=True):
    """Where a silo stands in a run: at the beginning of `step`, or at its end, all gradients there.

    `loss_tokens` is None at the beginning; `loss` is their sum. The noise's moments are those `before`
    the step and `after` it, and `secret` is what the noise is made of.
    """

    step: int
    loss_tokens: int | None
    loss: float
    before: Moments
    after: Moments
    secret: bytes


class Snapshot(Struct, frozen=True, forbid_unknown_fields=True):
    """How to join the run again, and under which `terms` (model, plan, data, noise) it was begun."""

    ticket: bytes
    seat: bytes
    terms: dict[str, str]
    standing: Standing

    def cut(self, blocks: int) -> Partition:
        """How it cuts a model of so many blocks."""
        trunk = Span.parse(self.terms["trunk"])
        return Partition(trunk.start, blocks - trunk.stop)

    def check(self, terms: Mapping[str, str]) -> None:
        """Raises `MismatchError`, naming it, if something is not as it was when the run began."""
        for what in sorted(self.terms.keys() | terms.keys()):
            then, now = self.terms.get(what, "unknown"), terms.get(what, "unknown")
            if then != now:
                raise MismatchError(
                    f"the unfinished run was begun with another {what}: {then}, now {now}",
                    hint="Repeat the command that began it, with --resume.",
                )


def write_snapshot(directory: Path, snapshot: Snapshot, tensors: Mapping[str, Tensor]) -> None:
    """Replace the directory's snapshot, which only its owner may read. Raises `SaveError`."""
    try:
        Directory(directory).write(FILE, seal(snapshot, tensors))
    except OSError as error:
        raise SaveError(
            f"the unfinished run cannot be saved at {directory}: {error}",
            hint="Free some space, and go on with --resume.",
        ) from None


def read_snapshot(directory: Path) -> tuple[Snapshot, dict[str, Tensor]] | None:
    """The unfinished run in a directory, if there is one. Raises `SaveError` if it is damaged."""
    try:
        return unseal(Directory(directory).read(FILE), Snapshot)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, SaveError) as error:
        raise SaveError(f"{directory / FILE} cannot be read: {error}") from None


def remove_snapshot(directory: Path) -> None:
    """The run is finished."""
    Directory(directory).remove(FILE)
