"""The peers that are attached, and which worker can serve a request."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from codec.errors import MismatchError, TrunklineError, UnavailableError
from codec.messages import ENCODINGS, Attach, Encoding, Encodings, Role
from codec.partition import Span
from codec.plan import ModelCard


def alias_of(peer: bytes) -> bytes:
    """What other parties call a peer: it does not give away the identity it attaches with."""
    return hashlib.blake2b(peer, digest_size=8).digest()


@dataclass(slots=True)
class Peer:
    """An attached silo or worker. `route` is the socket's name for its connection."""

    route: bytes
    alias: bytes
    role: Role
    name: str
    last_heard: float
    model: ModelCard | None = None
    blocks: Span = field(default_factory=lambda: Span(0, 0))
    load: int = 0
    """Sessions and runs that a worker holds."""
    encodings: frozenset[Encoding] = frozenset()
    """What it reads."""


def peer_from(route: bytes, attach: Attach, now: float) -> Peer:
    """A peer as it introduced itself.

    Raises `MismatchError` for a worker without a span, and for who does not read the plain encodings.
    """
    if attach.role == "worker" and (
        attach.model is None or not attach.start < attach.stop <= attach.model.blocks
    ):
        raise MismatchError("a worker must say which model and which blocks it hosts", side="worker")
    if not {"raw", "planes"}.issubset(attach.encodings):
        raise MismatchError("every peer must read raw and planes", side=attach.role)
    blocks = Span(attach.start, attach.stop) if attach.role == "worker" else Span(0, 0)
    return Peer(
        route=route,
        alias=alias_of(attach.peer),
        role=attach.role,
        name=attach.name,
        last_heard=now,
        model=attach.model,
        blocks=blocks,
        encodings=frozenset(attach.encodings),
    )


def common_encodings(workers: Iterable[Peer]) -> Encodings:
    """What every one of these workers reads; everything while there is none."""
    pool = [worker.encodings for worker in workers]
    return tuple(encoding for encoding in ENCODINGS if all(encoding in reads for reads in pool))


def choose_worker(workers: Iterable[Peer], model: ModelCard, blocks: Span, encodings: Encodings) -> Peer:
    """The least loaded worker that hosts these blocks of this model and reads these encodings.

    Raises `UnavailableError` while there is none, `MismatchError` if there are only others.
    """
    pool = list(workers)
    hosting = [w for w in pool if w.model and not w.model.differs_from(model) and w.blocks.contains(blocks)]
    reading = [worker for worker in hosting if worker.encodings.issuperset(encodings)]
    if reading:
        return min(reading, key=lambda worker: worker.load)
    if hosting:
        raise MismatchError(
            f"no worker that hosts {blocks} reads all of {', '.join(encodings)}",
            side="worker",
            hint="Choose another --wire, or update the workers.",
        )
    raise _nobody(pool, model, blocks)


def _nobody(pool: list[Peer], model: ModelCard, blocks: Span) -> TrunklineError:
    if not pool:
        return UnavailableError(
            "no worker is attached to the broker",
            hint=f"Start one: trunkline worker --broker URL --model {model.name}",
        )
    same = [w for w in pool if w.model and not w.model.differs_from(model)]
    if same:
        spans = ", ".join(str(w.blocks) for w in same)
        return MismatchError(
            f"blocks {blocks} are needed, the workers host {spans}",
            side="worker",
            hint="Start a worker with --blocks that cover them, or choose other --head and --tail.",
        )
    known = {f"{w.model.name} ({w.model.differs_from(model)})" for w in pool if w.model}
    return MismatchError(
        f"the silo holds {model.name}, the workers hold {', '.join(sorted(known))}",
        hint="Give silo and worker the same --model.",
    )
