"""A worker's links to all of its brokers, joined: every one knows the whole pool then."""

import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from broker.endpoint import no_answer
from broker.keys import LinkKeys
from broker.link import Link, ZmqLink
from broker.parcel import Parcel
from broker.pool import common_encodings
from broker.speed import Speed
from broker.ways import Ways
from codec.errors import TrunklineError
from codec.logs import Log
from codec.messages import Attach, Drain, Encodings, Gone

_LOOK_S = 0.1
_RETRY_S = 5.0
"""A link that failed, as one whose key was refused, is made anew after so long."""


class Links:
    """A `broker.link.Link` to several brokers at once. A broker that is lost costs its own silos alone.

    It fails when no broker had it attached for `patience` seconds. Each link that `connect` makes from
    an endpoint should try for ever.
    """

    def __init__(self, endpoints: Sequence[str], connect: Callable[[str], Link], *, patience: float) -> None:
        """Start connecting; nothing is awaited. Raises what `connect` raises."""
        self._endpoints, self._connect, self._patience = endpoints, connect, patience
        self._closing, self._threads = threading.Event(), list[threading.Thread]()
        self._links: list[Link] = []
        try:
            for endpoint in endpoints:
                self._links.append(connect(endpoint))
        except TrunklineError:
            self.close()
            raise
        self._ways, self._lock = Ways(), threading.Lock()
        self._inbox: queue.SimpleQueue[tuple[int, Parcel]] = queue.SimpleQueue()
        self._told: deque[Parcel] = deque()
        self._errors: dict[int, TrunklineError] = {}
        self._attached_at = dict.fromkeys(range(len(endpoints)), time.monotonic())
        self._threads = [
            threading.Thread(target=self._pump, args=(number,), name="links", daemon=True)
            for number in self._attached_at
        ]
        for thread in self._threads:
            thread.start()

    @property
    def speed(self) -> Speed | None:
        """That of the first link which has measured it."""
        return next((link.speed for link in self._links if link.speed), None)

    @property
    def encodings(self) -> Encodings:
        """What every worker at every broker reads."""
        return common_encodings(link.encodings for link in self._links)

    @property
    def attached(self) -> bool:
        """See `broker.link.Link.attached`."""
        return any(link.attached for link in self._links)

    def elsewhere(self) -> None:
        """All brokers are used already."""

    def send(self, parcel: Parcel) -> None:
        """An answer goes to the broker that its request came from, and all else to every broker."""
        if isinstance(parcel.header, Drain):
            for link in self._links:
                with contextlib.suppress(TrunklineError):
                    link.send(parcel)
            return
        with self._lock:
            number = self._ways.back(parcel)
        if number is not None:
            self._links[number].send(parcel)

    def receive(self, timeout: float) -> Parcel | None:
        """See `broker.link.Link.receive`."""
        until = time.monotonic() + max(0.0, timeout)
        while True:
            self._look(now := time.monotonic())
            if self._told:
                return self._told.popleft()
            try:
                number, parcel = self._inbox.get(timeout=max(0.0, min(_LOOK_S, until - now)))
            except queue.Empty:
                if now >= until:
                    return None
                continue
            with self._lock:
                came = self._ways.came(number, parcel)
            self._told.extend(came.told)
            if came.answered is not None:
                with contextlib.suppress(TrunklineError):
                    self._links[number].send(came.answered)

    def close(self) -> None:
        """See `broker.link.Link.close`."""
        self._closing.set()
        for thread in self._threads:
            thread.join(2.0)
        for link in self._links:
            link.close()

    def _pump(self, number: int) -> None:
        """Take what comes through one link, and make it anew if it failed."""
        while not self._closing.is_set():
            try:
                parcel = self._links[number].receive(_LOOK_S)
            except TrunklineError as error:
                Log("links").warn("a broker is lost", endpoint=self._endpoints[number], why=str(error))
                self._errors[number] = error
                # A link that is made anew knows nothing: it could not tell that its silos' names are gone.
                self._inbox.put((number, Parcel.of(Gone(name="every silo"))))
                if not self._closing.wait(_RETRY_S):
                    self._links[number].close()
                    self._links[number] = self._connect(self._endpoints[number])
                continue
            if parcel is not None:
                self._inbox.put((number, parcel))

    def _look(self, now: float) -> None:
        """Who is attached; raises the error that ends it all."""
        for number, link in enumerate(self._links):
            if link.attached:
                self._attached_at[number] = now
                self._errors.pop(number, None)
            elif now - self._attached_at[number] > self._patience:
                with self._lock:
                    self._told.extend(self._ways.lost(number))
        if len(self._errors) == len(self._links) or now - max(self._attached_at.values()) > self._patience:
            why = next(iter(self._errors.values()), None)
            raise why or no_answer(self._endpoints, f"for {self._patience:g} s")


def attach_everywhere(
    endpoints: Sequence[str], attach: Attach, *, patience: float, keys: LinkKeys | None = None
) -> Link:
    """A worker's link to all its brokers. Raises `UsageError` as `ZmqLink` does."""
    if len(endpoints) == 1:
        return ZmqLink(endpoints, attach, patience=patience, keys=keys)
    return Links(
        endpoints,
        lambda endpoint: ZmqLink(endpoint, attach, patience=math.inf, keys=keys),
        patience=patience,
    )
