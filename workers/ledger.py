"""Who has committed what in the current step of a run. Decisions only: no tensors, no sockets."""

from dataclasses import dataclass, field

import msgspec

from codec.errors import (
    EndedError,
    LimitError,
    MismatchError,
    ProtocolError,
    TrunklineError,
    UnavailableError,
    UnknownNameError,
)
from codec.messages import Commit
from codec.plan import RunPlan


@dataclass(slots=True)
class Ledger:
    """A run's members and the commits of step `step`. `left` says who went before the end.

    A run that `survives` keeps the seats of members that vanish. Where one of them had a part in the
    step, the step begins anew: all who had are `outdated` until they join again.
    """

    plan: RunPlan
    step: int = 0
    survives: bool = False
    seats: dict[bytes, bytes] = field(default_factory=dict)
    """Who sits where, by alias; nobody (empty) where a member vanished."""
    commits: dict[bytes, Commit] = field(default_factory=dict)
    taking_part: set[bytes] = field(default_factory=set)
    """Members of whom something of this step is here."""
    outdated: set[bytes] = field(default_factory=set)
    left: str = ""

    @property
    def members(self) -> set[bytes]:
        """The silos that sit somewhere."""
        return {silo for silo in self.seats.values() if silo}

    def join(
        self, silo: bytes, plan: RunPlan, seat: bytes = b"", *, again: bool = False
    ) -> dict[bytes, Commit] | None:
        """A silo takes a seat, its own if it joins `again`. If that makes the step begin anew, the
        commits that waited and are void now, else None.

        Raises `MismatchError` for another plan, `LimitError` if the run is full, `UnknownNameError`
        for a seat that is not of this run, `EndedError` if it cannot go on, and `UnavailableError` to a
        newcomer then: the name is free to open anew once all have left.
        """
        if plan != self.plan:
            raise MismatchError(
                "this run was opened with other settings",
                hint="Give every silo of a run the same options, or choose another --run.",
            )
        seat = seat or silo
        before = self.seats.get(seat, b"")
        if seat not in self.seats:
            if silo in self.members:
                before = silo
            elif again and self.step:
                raise UnknownNameError("this run has no such seat")
            elif len(self.seats) >= self.plan.silos and not self._free_a_seat():
                raise LimitError(
                    f"this run is for {self.plan.silos} silos, and they are here",
                    side="silo",
                    hint="A silo that was in it goes on with --resume.",
                )
        if self.left:
            raise self._over(EndedError if again else UnavailableError)
        anew = self._begin_anew() if self.survives and {before, silo} & self.taking_part else None
        self._forget(before)
        self.seats = {s: member for s, member in self.seats.items() if member != silo}
        self.seats[seat] = silo
        self.outdated.discard(silo)
        return anew

    def _free_a_seat(self) -> bool:
        """Before the first step nothing is lost with a seat whose silo vanished."""
        empty = next((seat for seat, silo in self.seats.items() if not silo), None)
        if self.step or empty is None:
            return False
        del self.seats[empty]
        return True

    def _forget(self, silo: bytes) -> None:
        self.taking_part.discard(silo)
        self.outdated.discard(silo)

    def _begin_anew(self) -> dict[bytes, Commit]:
        void = dict(self.commits)
        self.commits.clear()
        self.outdated |= self.taking_part
        self.taking_part.clear()
        return void

    def check(self, silo: bytes) -> None:
        """Raises unless `silo` is a member of a run that can still go on, and knows where it stands."""
        if silo not in self.members:
            raise UnknownNameError("you are not in this run")
        if self.left:
            raise self._over(EndedError)
        if silo in self.outdated:
            raise self.begins_anew()

    def begins_anew(self) -> UnavailableError:
        """What those are told whose part in the step is void."""
        return UnavailableError(
            f"step {self.step} begins anew: a silo that had a part in it was lost",
            side="silo",
            hint="Join the run again.",
        )

    def _over(self, kind: type[TrunklineError]) -> TrunklineError:
        return kind(
            f"{self.left} left the run at step {self.step}",
            side="silo",
            hint="Start every silo again; --resume goes on from a saved adapter.",
        )

    def takes_part(self, silo: bytes) -> None:
        """A micro-batch of this silo is accepted. Raises what `check` raises."""
        self.check(silo)
        self.taking_part.add(silo)

    def commit(self, silo: bytes, commit: Commit) -> bool:
        """Record one silo's commit; True once every silo's is there.

        The same commit again takes the place of the first. Raises on a wrong step or another commit.
        """
        self.check(silo)
        if commit.step != self.step:
            raise ProtocolError(f"the run is at step {self.step}, the commit is of step {commit.step}")
        before = self.commits.get(silo)
        if before is not None and msgspec.structs.replace(before, id=commit.id) != commit:
            raise ProtocolError(f"step {self.step} was committed by this silo already")
        if commit.names and self.plan.ends != "shared":
            raise ProtocolError("the ends' gradients cross only with --ends shared")
        first = next(iter(self.commits.values()), commit)
        if commit.names != first.names:
            raise MismatchError(
                "with shared ends every silo needs the same partition and the same targets",
                hint="Give all silos the same --head, --tail and --lora-targets, or use --ends own.",
            )
        self.commits[silo] = commit
        self.taking_part.add(silo)
        return len(self.commits) == self.plan.silos

    def totals(self) -> tuple[int, float]:
        """Loss tokens, and the squared norm of all silos' own gradients."""
        commits = self.commits.values()
        return sum(c.loss_tokens for c in commits), sum(c.square_norm for c in commits)

    def stepped(self) -> None:
        """The step was taken."""
        self.commits.clear()
        self.taking_part.clear()
        self.step += 1

    def away(self, silo: bytes) -> dict[bytes, Commit] | None:
        """A silo vanished from a run that survives, and its seat is kept. Returns what `join` returns."""
        anew = self._begin_anew() if silo in self.taking_part else None
        self._forget(silo)
        self.seats = {seat: b"" if member == silo else member for seat, member in self.seats.items()}
        return anew

    def leave(self, silo: bytes, who: str) -> dict[bytes, Commit]:
        """A silo is gone for good; returns the commits that now wait in vain, its own too.

        Before the run's last step nobody can go on without it; after that nobody needs it.
        """
        self._forget(silo)
        self.seats = {seat: member for seat, member in self.seats.items() if member != silo}
        if self.step < self.plan.steps:
            self.left = self.left or who
        vain = dict(self.commits)
        self.commits.clear()
        return vain
