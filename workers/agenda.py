"""What a worker does next: which of the waiting requests share the next pass through the trunk.

Decisions only: no tensors, no sockets. Everything compatible that waits goes into one pass: decode
steps of many sessions, and as much of long prompts as does not stall them; micro-batches of several
silos while they are small; the backward passes of micro-batches that went forward together.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["alone", "decode", "backward", "prefill", "forward"]
_ORDER: tuple[Kind, ...] = ("alone", "decode", "backward", "prefill", "forward")

MAX_PASS_TOKENS = 4096
"""Tokens in one pass; a request that may not be cut and is longer runs alone."""
_TURNS = 8
"""Passes that go before a kind that waits, before it has its turn whatever else there is."""
_RECENT_S = 1.0
"""For so long after a decode step another one is expected, and prompts are cut for it."""
_WORTH = 0.5
"""A session that is expected back within this share of a decode pass is waited for."""
_LATE = 1.5
"""Of the time that it is expected to take."""
_REMEMBERED = 4096
"""Sessions of which that is known; then those that have gone are forgotten."""


@dataclass(slots=True, eq=False)
class Job:
    """A request in the worker's hands.

    Requests of one `flow` (a silo's session, or run) keep their order where it matters: of one `unit`
    (a session, a micro-batch) always; a job of the kind `alone` (open, commit, close) waits for all
    before it in its flow, and all after it wait for it. `flow` None is every flow of the silo; `silo`
    empty is every silo.
    """

    silo: bytes
    kind: Kind
    flow: Hashable = None
    unit: Hashable = None
    tokens: int = 0
    """Still to do; a prompt is done in parts."""
    whole: bool = True
    """Whether it must be done in one pass."""
    group: int | None = None
    """Of a backward: the micro-batches that went forward together, whose activations are one."""
    due: float = 0.0
    """Of a backward: when it no longer waits for the others of its group."""


@dataclass(frozen=True, slots=True)
class Share:
    """`tokens` of a job, the next ones."""

    job: Job
    tokens: int


@dataclass(frozen=True, slots=True)
class Pass:
    """What to do now, at once. One of `alone` holds one job; a `decode` may hold parts of prompts."""

    kind: Kind
    shares: tuple[Share, ...]


@dataclass(slots=True)
class Absent:
    """Sessions whose step was answered and whose next one has not come, and how long they tend to take."""

    _since: dict[Hashable, float] = field(default_factory=dict)
    _usual: dict[Hashable, float] = field(default_factory=dict)

    def left(self, flow: Hashable, now: float) -> None:
        """It was answered."""
        self._since[flow] = now
        if len(self._usual) + len(self._since) > _REMEMBERED:
            self._since = {other: at for other, at in self._since.items() if now - at < _RECENT_S}
            self._usual = {other: usual for other, usual in self._usual.items() if other in self._since}

    def back(self, flow: Hashable, now: float) -> None:
        """It asks for something again."""
        if (since := self._since.pop(flow, None)) is not None:
            took = max(0.0, now - since)
            self._usual[flow] = (self._usual.get(flow, took) + took) / 2

    def awaited(self, soon: float) -> float:
        """Until when those are waited for that are usually back within `soon` seconds."""
        return max(
            (
                at + _LATE * self._usual[flow]
                for flow, at in self._since.items()
                if self._usual.get(flow, soon) < soon
            ),
            default=float("-inf"),
        )


@dataclass(slots=True)
class Agenda:
    """The jobs that wait, in the order in which they came."""

    joint_tokens: int = 512
    """Micro-batches go forward together up to this many tokens: beyond, nothing is won by it."""
    waiting: dict[Job, None] = field(default_factory=dict)
    absent: Absent = field(default_factory=Absent)
    _passed_over: dict[Kind, int] = field(default_factory=dict)
    _decoded: float = float("-inf")
    _held: float = float("-inf")

    def add(self, job: Job, now: float) -> None:
        """A request came, at `now`."""
        self.waiting[job] = None
        self.absent.back(job.flow, now)

    def answered(self, jobs: Iterable[Job], now: float) -> None:
        """Decode steps were answered: the sessions' next ones may be on their way soon."""
        here = {job.flow for job in self.waiting}
        for job in jobs:
            if job.flow not in here:
                self.absent.left(job.flow, now)

    def drop(self, job: Job) -> None:
        """A request came to nothing: what is left of it is not done."""
        self.waiting.pop(job, None)

    def due(self) -> float | None:
        """When what waits for others will run without them; None if nothing does."""
        times = [job.due for job in self.waiting if job.kind == "backward"]
        times += [self._held] if any(job.kind == "decode" for job in self.waiting) else []
        return min(times, default=None)

    def next_pass(
        self, now: float, chunk: int, members: Mapping[int, int], step_s: float = 0.0
    ) -> Pass | None:
        """Choose the next pass, and take its shares off the agenda; None if nothing may run yet.

        `chunk` is how many tokens of prompts may go into a pass while sessions decode; `members` how
        many micro-batches of each group wait for their backward; `step_s` what a decode pass takes.
        """
        ready: dict[Kind, list[Job]] = {}
        for job in self._eligible():
            ready.setdefault(job.kind, []).append(job)
        if groups := _complete(ready.pop("backward", []), members, now):
            ready["backward"] = groups
        if not ready:
            return None
        if ready.keys() <= {"decode", "prefill"} and "decode" in ready:
            # Sessions that are a moment late would make a pass of their own, and never meet these again.
            self._held = self.absent.awaited(_WORTH * step_s)
            if now < self._held:
                return None
        kind = self._turn(ready)
        room = chunk if now - self._decoded < _RECENT_S else MAX_PASS_TOKENS
        match kind:
            case "decode":
                self._decoded = now
                decodes = _filled(ready["decode"], MAX_PASS_TOKENS)
                shares = [*decodes, *_filled(ready.get("prefill", []), chunk)]
            case "prefill":
                shares = _filled(ready["prefill"], room)
            case "forward":
                shares = _filled(ready["forward"], self.joint_tokens)
            case "alone":
                shares = [Share(ready["alone"][0], 0)]
            case _:
                shares = [Share(job, job.tokens) for job in ready["backward"]]
        return self._taken(kind, shares)

    def _eligible(self) -> Iterator[Job]:
        """Jobs that nothing earlier stands in the way of."""
        units: set[Hashable] = set()
        flows: set[Hashable] = set()
        closed: set[Hashable] = set()
        silos: set[bytes] = set()
        for job in self.waiting:
            if b"" in closed or job.silo in closed:
                continue
            if job.flow is None:
                if job.silo not in silos and (job.silo or not silos):
                    yield job
                closed.add(job.silo)
            elif job.kind == "alone":
                if job.flow not in flows:
                    yield job
                closed.add(job.flow)
            elif job.flow not in closed and job.unit not in units:
                yield job
            units.add(job.unit)
            flows.add(job.flow)
            silos.add(job.silo)

    def _turn(self, ready: Mapping[Kind, list[Job]]) -> Kind:
        """The first kind in order, or one that was passed over too often. Counts who is passed over."""
        kinds = [kind for kind in _ORDER if kind in ready]
        starved = [kind for kind in kinds if self._passed_over.get(kind, 0) >= _TURNS]
        chosen = max(starved, key=lambda kind: self._passed_over[kind], default=kinds[0])
        self._passed_over = {kind: self._passed_over.get(kind, 0) + 1 for kind in kinds if kind != chosen}
        return chosen

    def _taken(self, kind: Kind, shares: list[Share]) -> Pass:
        for share in shares:
            share.job.tokens -= share.tokens
            if not share.job.tokens:
                del self.waiting[share.job]
        return Pass(kind, tuple(shares))


def _complete(backwards: list[Job], members: Mapping[int, int], now: float) -> list[Job]:
    """The backward jobs that run next: a whole group if there is one, else who waited long enough."""
    groups: dict[int | None, list[Job]] = {}
    for job in backwards:
        groups.setdefault(job.group, []).append(job)
    for group, jobs in groups.items():
        if group is None:
            return jobs[:1]
        if len(jobs) >= members.get(group, 0) or any(job.due <= now for job in jobs):
            return jobs
    return []


def _filled(jobs: list[Job], room: int) -> list[Share]:
    """The jobs, in order, that fit into `room` tokens; at least one, cut to fit if it may be."""
    shares: list[Share] = []
    for job in jobs:
        if job.tokens <= room or (not shares and job.whole):
            shares.append(Share(job, job.tokens))
        elif not job.whole and room > 0:
            shares.append(Share(job, room))
        else:
            continue
        room -= shares[-1].tokens
    return shares
