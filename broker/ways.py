"""Through which of its brokers a worker reaches each silo. Pure decisions over state, no sockets.

A silo uses one broker at a time and comes with the same alias at every one. What it opens at a new
broker says that it has moved: what it had through the last one is void, and what comes late from there
is neither carried out nor taken for its end.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from broker.parcel import Parcel, error_parcel
from codec.errors import UnavailableError
from codec.messages import Gone, OpenRun, OpenSession, Request

_MAX_SILOS = 1 << 16
"""Those that were silent for longest are forgotten: not every silo that leaves is told of."""


@dataclass(frozen=True, slots=True)
class Came:
    """What follows a message: what the worker is told, and what is answered for it on the same link."""

    told: tuple[Parcel, ...] = ()
    answered: Parcel | None = None


class Ways:
    """Which link each silo was heard through last, and where answers are awaited."""

    def __init__(self) -> None:
        self._home: dict[bytes, int] = {}
        self._asked: dict[tuple[bytes, int], list[int]] = {}

    def came(self, link: int, parcel: Parcel) -> Came:
        """A message came through a link."""
        header, silo = parcel.header, parcel.peer
        if isinstance(header, Gone):
            return Came(self._gone(link, parcel) if silo else tuple(self.lost(link)))
        if not isinstance(header, Request):
            return Came((parcel,))
        home = self._home.get(silo, link)
        moves = home != link and isinstance(header, OpenSession | OpenRun)
        if home != link and not moves:
            return Came(answered=error_parcel(header.id, _moved()).to(silo))
        self._note(silo, link)
        self._asked.setdefault((silo, header.id), []).append(link)
        left = (Parcel.of(Gone(name="one that came through another broker"), peer=silo),) if moves else ()
        return Came((*left, parcel))

    def back(self, answer: Parcel) -> int | None:
        """The link that an answer goes to; None if nobody waits for it there any more."""
        key = answer.peer, answer.header.id
        links = self._asked.get(key, [])
        link = links.pop(0) if links else None
        if not links:
            self._asked.pop(key, None)
        return link

    def lost(self, link: int) -> Iterable[Parcel]:
        """The broker behind a link is lost, or knows nothing: gone are those last heard through it."""
        silos = [silo for silo, home in self._home.items() if home == link]
        for silo in silos:
            del self._home[silo]
        return [Parcel.of(Gone(name="one whose broker is lost"), peer=silo) for silo in silos]

    def _note(self, silo: bytes, link: int) -> None:
        self._home.pop(silo, None)
        self._home[silo] = link  # The last one heard stands last.
        if len(self._home) > _MAX_SILOS:
            del self._home[next(iter(self._home))]

    def _gone(self, link: int, parcel: Parcel) -> tuple[Parcel, ...]:
        if self._home.get(parcel.peer, link) != link:
            return ()
        self._home.pop(parcel.peer, None)
        return (parcel,)


def _moved() -> UnavailableError:
    return UnavailableError("the silo has moved to another broker since", hint="Open it anew.")
