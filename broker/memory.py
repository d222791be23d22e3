"""A broker without sockets: the same router, in-process queues. For tests and for one-process use."""

import queue
import secrets
import threading
import time

from broker.parcel import Parcel, error_in
from broker.router import Router, Send
from broker.speed import Speed
from codec.errors import LinkError
from codec.messages import ENCODINGS, Attach, Encodings, Error, Heartbeat, Leave, Welcome


class MemoryBroker:
    """Routes between the links it hands out. Every message passes the real router."""

    def __init__(self, router: Router | None = None) -> None:
        self.router = router or Router()
        self._lock = threading.Lock()
        self._inboxes: dict[bytes, queue.SimpleQueue[Parcel]] = {}
        self.passed: list[Parcel] = []
        """Everything that was routed, in order: what an observer of the wire would see."""

    def link(self, attach: Attach) -> "MemoryLink":
        """A link that is attached already."""
        route = secrets.token_bytes(5)
        self._inboxes[route] = queue.SimpleQueue()
        self.route(route, Parcel.of(attach))
        return MemoryLink(self, route, self._inboxes[route])

    def route(self, route: bytes, parcel: Parcel) -> None:
        """Take one message from `route` and deliver what the router decides."""
        with self._lock:
            now = time.monotonic()
            for peer in self.router.peers.values():
                peer.last_heard = now  # Nobody falls silent in one process.
            for send in self.router.handle(route, parcel, now):
                self._deliver(send)

    def drop(self, route: bytes) -> None:
        """The link of `route` is closed: the router hears a goodbye."""
        self.route(route, Parcel.of(Leave()))
        self._inboxes.pop(route, None)

    def _deliver(self, send: Send) -> None:
        self.passed.append(send.parcel)
        if inbox := self._inboxes.get(send.route):
            # As on a wire: the header is read anew and frames are bytes.
            inbox.put(Parcel.read([bytes(frame) for frame in send.parcel.frames()]))


class MemoryLink:
    """A `broker.link.Link` to a `MemoryBroker`."""

    def __init__(self, broker: MemoryBroker, route: bytes, inbox: "queue.SimpleQueue[Parcel]") -> None:
        self._broker, self._route, self._inbox = broker, route, inbox
        self._closed = False
        self.encodings: Encodings = ENCODINGS
        self.speed: Speed | None = None
        """Nothing is sent anywhere: there is nothing to measure."""

    @property
    def attached(self) -> bool:
        """See `broker.link.Link.attached`."""
        return not self._closed

    def elsewhere(self) -> None:
        """See `broker.link.Link.elsewhere`."""

    def send(self, parcel: Parcel) -> None:
        """See `broker.link.Link.send`."""
        if self._closed:
            raise LinkError("the link to the broker is closed", side="silo")
        self._broker.route(self._route, parcel)

    def receive(self, timeout: float) -> Parcel | None:
        """See `broker.link.Link.receive`."""
        deadline = time.monotonic() + max(0.0, timeout)
        while True:
            try:
                parcel = self._inbox.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            header = parcel.header
            if isinstance(header, Error) and header.id == 0:
                raise error_in(header)
            if not isinstance(header, Welcome | Heartbeat | Leave):
                return parcel

    def close(self) -> None:
        """See `broker.link.Link.close`."""
        if not self._closed:
            self._closed = True
            self._broker.drop(self._route)
