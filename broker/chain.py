"""A session that several workers share: what each is asked, and when. Decisions only.

One request of the session at a time passes the stages. So those that follow find every stage's caches
as the one before left them, whatever became of it.
"""

import re
from collections import deque
from dataclasses import dataclass

import msgspec

from broker.parcel import Frames, Parcel
from broker.pool import Worker
from broker.routes import Stage
from codec.errors import MismatchError
from codec.messages import CloseSession, Error, Extend, OpenSession, Result, Specs
from codec.partition import Span

_BLOCK = re.compile(r"model\.layers\.(\d{1,4})\.")


@dataclass(frozen=True, slots=True)
class Errand:
    """Ask this of that worker."""

    worker: Worker
    parcel: Parcel


@dataclass(frozen=True, slots=True)
class Progress:
    """What an answer led to: what the silo is told if its request is done, and what to ask next."""

    answer: Parcel | None
    errands: list[Errand]


class Chain:
    """The stages of one session, and the requests about it that are not done."""

    def __init__(self, session: str, stages: tuple[Stage, ...]) -> None:
        self.session = session
        self.stages = stages
        self.blocks = Span(stages[0].blocks.start, stages[-1].blocks.stop)
        self.open = False
        """All stages have opened it."""
        self._queue: deque[Parcel] = deque()
        self._awaited: list[int] = []
        self._seconds = 0.0
        self._refusal: Parcel | None = None

    @property
    def idle(self) -> bool:
        """Every request is done."""
        return not self._queue

    def check(self, header: OpenSession) -> None:
        """Raises `MismatchError` if it is opened again over other blocks than it is made of."""
        blocks = Span(header.start, header.stop)
        if blocks != self.blocks:
            raise MismatchError(
                f"session {self.session!r} is open over blocks {self.blocks}, not {blocks}",
                hint="Close it first, or choose another name.",
            )

    def put(self, parcel: Parcel) -> list[Errand]:
        """A request of the silo's about this session; what to ask now."""
        self._queue.append(parcel)
        return self._begin() if len(self._queue) == 1 else []

    def answered(self, worker: Worker, parcel: Parcel) -> Progress:
        """A stage answered the request under way."""
        index = next(n for n, stage in enumerate(self.stages) if stage.worker is worker)
        self._awaited.remove(index)
        asked, said = self._queue[0], parcel.header
        if isinstance(asked.header, Extend):
            if isinstance(said, Result):
                self._seconds += said.seconds
                if index + 1 < len(self.stages):
                    return Progress(None, [self._extend(index + 1, said.tensors, parcel.tensors)])
                parcel = Parcel.of(msgspec.structs.replace(said, seconds=self._seconds), parcel.tensors)
            return self._done(parcel, [])
        if isinstance(said, Error):
            self._refusal = self._refusal or parcel
        if self._awaited:
            return Progress(None, [])
        self.open = isinstance(asked.header, OpenSession) and self._refusal is None
        failed = isinstance(asked.header, OpenSession) and not self.open
        return self._done(self._refusal or parcel, self.closing() if failed else [])

    def closing(self) -> list[Errand]:
        """Close it at every stage; nobody waits for the answers."""
        close = Parcel.of(CloseSession(session=self.session))
        return [Errand(stage.worker, close) for stage in self.stages]

    def _done(self, answer: Parcel, errands: list[Errand]) -> Progress:
        self._queue.popleft()
        return Progress(answer, errands + (self._begin() if self._queue else []))

    def _begin(self) -> list[Errand]:
        asked = self._queue[0]
        self._seconds, self._refusal = 0.0, None
        if isinstance(asked.header, Extend):
            specs, frames = asked.header.tensors, asked.tensors
            # Only the mask is wanted once more: the tensors need not be kept.
            self._queue[0] = Parcel(asked.peer, asked.header, asked.raw, frames[len(specs) :])
            return [self._extend(0, specs, frames[: len(specs)])]
        self._awaited = list(range(len(self.stages)))
        if isinstance(asked.header, OpenSession):
            return [Errand(stage.worker, self._opening(asked, asked.header, stage)) for stage in self.stages]
        return [Errand(stage.worker, asked) for stage in self.stages]

    def _extend(self, index: int, specs: Specs, frames: Frames) -> Errand:
        """Stages before the last answer as they computed: nothing is lost on the way."""
        asked = self._queue[0]
        assert isinstance(asked.header, Extend)
        self._awaited = [index]
        wire = asked.header.wire if index + 1 == len(self.stages) else "raw"
        header = msgspec.structs.replace(asked.header, tensors=specs, wire=wire)
        return Errand(self.stages[index].worker, Parcel.of(header, (*frames, *asked.tensors)))

    def _opening(self, asked: Parcel, header: OpenSession, stage: Stage) -> Parcel:
        """The stage's own blocks, and those of the adapter's tensors that belong to them."""
        part = msgspec.structs.replace(header, start=stage.blocks.start, stop=stage.blocks.stop)
        if not len(header.names) == len(header.tensors) == len(asked.tensors):
            return Parcel.of(part, asked.tensors)  # Any stage refuses it.
        mine = [n for n, name in enumerate(header.names) if self._stage_of(name) is stage]
        names, specs = (tuple(of[n] for n in mine) for of in (header.names, header.tensors))
        part = msgspec.structs.replace(part, names=names, tensors=specs)
        return Parcel.of(part, tuple(asked.tensors[n] for n in mine))

    def _stage_of(self, name: str) -> Stage:
        """Whose block this tensor is in; the first stage refuses what is in nobody's."""
        found = _BLOCK.match(name)
        block = int(found[1]) if found else -1
        return next((s for s in self.stages if s.blocks.start <= block < s.blocks.stop), self.stages[0])
