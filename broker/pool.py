"""The peers that are attached, and what a worker says of itself."""

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from broker.inbox import Inbox
from codec.errors import MismatchError
from codec.messages import ENCODINGS, Attach, Encoding, Encodings, Role
from codec.partition import Span
from codec.plan import ModelCard

if TYPE_CHECKING:
    from broker.silo import Pending


def alias_of(peer: bytes) -> bytes:
    """What other parties call a peer: it does not give away the identity it attaches with."""
    return hashlib.blake2b(peer, digest_size=8).digest()


@dataclass(slots=True, eq=False)
class Peer:
    """An attached silo or worker. `route` is the socket's name for its connection."""

    role: ClassVar[Role]

    alias: bytes
    route: bytes = b""
    name: str = ""
    last_heard: float = 0.0
    spoke: bool = False
    """Whether it said anything since it was let in: then it has read its welcome."""


@dataclass(slots=True, eq=False)
class Worker(Peer):
    """A worker, and the queue in front of it."""

    role: ClassVar[Role] = "worker"

    model: ModelCard | None = None
    blocks: Span = field(default_factory=lambda: Span(0, 0))
    encodings: frozenset[Encoding] = frozenset()
    """What it reads."""
    load: int = 0
    """Sessions and runs that it holds."""
    draining: bool = False
    """It wants no new ones."""
    inbox: "Inbox[Pending]" = field(default_factory=Inbox)

    def says(self, attach: Attach) -> None:
        """Take over what it says of itself."""
        self.model, self.blocks = attach.model, Span(attach.start, attach.stop)
        self.encodings = frozenset(attach.encodings)
        self.inbox.grant(attach.credit)


def check_attach(attach: Attach) -> None:
    """Raises `MismatchError` for a worker without a span, and for who does not read the plain encodings."""
    if attach.role == "worker" and (
        attach.model is None or not attach.start < attach.stop <= attach.model.blocks
    ):
        raise MismatchError("a worker must say which model and which blocks it hosts", side="worker")
    if not {"raw", "planes"}.issubset(attach.encodings):
        raise MismatchError("every peer must read raw and planes", side=attach.role)


def common_encodings(read: Iterable[Collection[Encoding]]) -> Encodings:
    """Of what each one reads, what all of them do; everything while there is none."""
    pool = list(read)
    return tuple(encoding for encoding in ENCODINGS if all(encoding in reads for reads in pool))
