"""The worker's loop: messages from the link to the service, answers back."""

from threading import Event

from broker.link import Link
from workers.service import TrunkService

_WAIT_S = 0.25


def serve(link: Link, service: TrunkService, stop: Event) -> None:
    """Serve until `stop` is set. Raises the link's error if the broker is gone for good."""
    while not stop.is_set():
        parcel = link.receive(_WAIT_S)
        if parcel is None:
            continue
        for answer in service.handle(parcel):
            link.send(answer)
