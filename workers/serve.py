"""The worker's loop: messages from the link to the service, answers back."""

from threading import Event

from broker.link import Link
from broker.parcel import Parcel
from workers.service import TrunkService

_WAIT_S = 0.25
_MAX_WAITING = 256
"""Requests taken at once: what came meanwhile is served together where it can be."""


def serve(link: Link, service: TrunkService, stop: Event) -> None:
    """Serve until `stop` is set. Raises the link's error if the broker is gone for good."""
    while not stop.is_set():
        parcel = link.receive(_WAIT_S)
        waiting: list[Parcel] = []
        while parcel is not None:
            waiting.append(parcel)
            parcel = link.receive(0.0) if len(waiting) < _MAX_WAITING else None
        for answer in service.handle(waiting):
            link.send(answer)
