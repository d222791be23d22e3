"""Who has committed what in the current step of a run. Decisions only: no tensors, no sockets."""

from dataclasses import dataclass, field

from codec.errors import LimitError, MismatchError, ProtocolError, UnavailableError, UnknownNameError
from codec.messages import Commit
from codec.plan import RunPlan


@dataclass(slots=True)
class Ledger:
    """A run's members and the commits of step `step`. `left` says who went before the end."""

    plan: RunPlan
    step: int = 0
    members: set[bytes] = field(default_factory=set)
    commits: dict[bytes, Commit] = field(default_factory=dict)
    left: str = ""

    def join(self, silo: bytes, plan: RunPlan) -> None:
        """A silo takes part.

        Raises `MismatchError` for another plan, `LimitError` if the run is full, and
        `UnavailableError` if it cannot go on: it is free to open anew once all its silos have left.
        """
        if plan != self.plan:
            raise MismatchError(
                "this run was opened with other settings",
                hint="Give every silo of a run the same options, or choose another --run.",
            )
        if silo not in self.members and len(self.members) >= self.plan.silos:
            raise LimitError(f"this run is for {self.plan.silos} silos, and they are here", side="silo")
        self._check_whole()
        self.members.add(silo)

    def check(self, silo: bytes) -> None:
        """Raises unless `silo` is a member of a run that can still go on."""
        if silo not in self.members:
            raise UnknownNameError("you are not in this run")
        self._check_whole()

    def _check_whole(self) -> None:
        if self.left:
            raise UnavailableError(
                f"{self.left} left the run at step {self.step}",
                side="silo",
                hint="Start every silo again; --resume goes on from a saved adapter.",
            )

    def commit(self, silo: bytes, commit: Commit) -> bool:
        """Record one silo's commit; True once every silo's is there. Raises on a wrong step or twice."""
        self.check(silo)
        if commit.step != self.step:
            raise ProtocolError(f"the run is at step {self.step}, the commit is of step {commit.step}")
        if silo in self.commits:
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
        return len(self.commits) == self.plan.silos

    def totals(self) -> tuple[int, float]:
        """Loss tokens, and the squared norm of all silos' own gradients."""
        commits = self.commits.values()
        return sum(c.loss_tokens for c in commits), sum(c.square_norm for c in commits)

    def stepped(self) -> None:
        """The step was taken."""
        self.commits.clear()
        self.step += 1

    def leave(self, silo: bytes, who: str) -> dict[bytes, Commit]:
        """A silo is gone for good; returns the commits that now wait in vain, its own too.

        Before the run's last step nobody can go on without it; after that nobody needs it.
        """
        self.members.discard(silo)
        if self.step < self.plan.steps:
            self.left = self.left or who
        vain = dict(self.commits)
        self.commits.clear()
        return vain
