"""The link: how silos and workers talk to the broker, over ZeroMQ, on a thread of its own.

The owner's thread computes; the link's thread moves frames, beats and re-attaches meanwhile.
"""

import contextlib
import queue
import socket as sockets
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import zmq

from broker.endpoint import check_endpoint, is_ipv6
from broker.failover import Connect
from broker.handshake import Watch
from broker.keys import LinkKeys
from broker.link_state import Action, Deliver, Fail, LinkState, Transmit
from broker.parcel import Parcel
from broker.pulse import ping, quiet_for
from broker.speed import Speed
from codec.errors import FrameError, LinkError, ProtocolError, TrunklineError
from codec.limits import MAX_FRAME_BYTES
from codec.logs import Log
from codec.messages import Attach, Encodings, Error, Leave

_GOODBYE_S = 0.5
_PARTING_MS = 100
_PING_S = 0.5
_LOOK_S = 0.1
_BURST = 256
"""Messages read before the link beats and sends again."""


class Link(Protocol):
    """A connection to a broker. `send` and `receive` may be called from different threads."""

    @property
    def speed(self) -> Speed | None:
        """How fast it is, as far as it was measured."""

    @property
    def encodings(self) -> Encodings:
        """What every worker attached to the broker reads."""

    @property
    def attached(self) -> bool:
        """Whether a broker knows of it now."""

    def elsewhere(self) -> None:
        """The broker has nobody who could serve: use another, if there is one."""

    def send(self, parcel: Parcel) -> None:
        """Queue a message. Order is kept.

        Raises `FrameError` for a tensor frame that is too large, and the link's error once it has
        failed or was closed.
        """

    def receive(self, timeout: float) -> Parcel | None:
        """The next message, or None after `timeout` seconds. Raises the link's error if it failed."""

    def close(self) -> None:
        """Say goodbye and end. Messages already sent are still delivered, within half a second."""


class ZmqLink:
    """A link over TCP. Attaches by itself, and again after every loss, for `patience` seconds.

    Of several brokers it uses one at a time, the first that serves. What was asked of the last one
    when it goes to another is answered with `UnavailableError`.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str],
        attach: Attach,
        *,
        patience: float = 30.0,
        keys: LinkKeys | None = None,
    ) -> None:
        """Start connecting; nothing is awaited.

        Raises `UsageError` for a malformed endpoint, and without `keys` for one beyond loopback.
        """
        endpoints = [endpoints] if isinstance(endpoints, str) else list(endpoints)
        for endpoint in endpoints:
            check_endpoint(endpoint, keys=keys is not None)
        self._endpoint = endpoints[0]
        self._keys = keys
        self._state = LinkState(attach, endpoints, patience, time.monotonic(), keys)
        self._inbox: queue.SimpleQueue[Parcel | TrunklineError] = queue.SimpleQueue()
        self._outbox: deque[Parcel] = deque()
        self._failure: TrunklineError | None = None
        self._closing = threading.Event()
        self._until = 0.0
        self._blocked = False
        self._moving = False
        self._unserved = threading.Event()
        # A socket object, not a bare pipe: a late `send` finds it closed, and not another's file.
        self._bell, self._button = sockets.socketpair()
        self._bell.setblocking(False)
        self._button.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)
        self._thread.start()

    @property
    def speed(self) -> Speed | None:
        """See `Link.speed`."""
        return self._state.meter.speed

    @property
    def encodings(self) -> Encodings:
        """See `Link.encodings`."""
        return self._state.encodings

    @property
    def attached(self) -> bool:
        """See `Link.attached`."""
        return self._state.attached

    def elsewhere(self) -> None:
        """See `Link.elsewhere`."""
        self._unserved.set()
        self._ring()

    def send(self, parcel: Parcel) -> None:
        """See `Link.send`."""
        if self._failure is not None:
            raise self._failure
        if self._closing.is_set():
            raise LinkError("the link to the broker is closed", side="silo")
        _check_frames(parcel)
        self._outbox.append(parcel)
        self._ring()

    def receive(self, timeout: float) -> Parcel | None:
        """See `Link.receive`."""
        wait = max(0.0, timeout) if self._failure is None else 0.0
        try:
            item = self._inbox.get(timeout=wait)
        except queue.Empty:
            if self._failure is not None:
                raise self._failure from None
            return None
        if isinstance(item, TrunklineError):
            raise item
        return item

    def close(self) -> None:
        """See `Link.close`."""
        self._closing.set()
        self._ring()
        self._thread.join(2.0)
        self._button.close()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # It rings already, or the thread is gone.
            self._button.send(b"!")

    def _run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]]
        with self._bell, zmq.Context() as context:
            try:
                self._moving = True
                while self._moving:
                    self._moving = False
                    with context.socket(zmq.DEALER) as socket:
                        self._connected(socket)
            except Exception as error:  # The owner must hear of it: it would wait for ever.
                Log("link").failed("the link broke")
                self._fail(TrunklineError(f"the link broke: {error}"))

    def _connected(self, socket: "zmq.Socket[bytes]") -> None:
        """Talk to one broker, until the link ends or another broker is to be used."""
        socket.setsockopt(zmq.LINGER, int(_GOODBYE_S * 1000))
        socket.setsockopt(zmq.IMMEDIATE, 1)  # Nothing is queued for a broker that is not there.
        socket.setsockopt(zmq.IPV6, is_ipv6(self._endpoint))
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        ping(socket, _PING_S)
        if self._keys is not None:
            self._keys.guard(socket)
        with contextlib.closing(Watch(socket, self._endpoint)) as watch:
            socket.connect(self._endpoint)
            self._loop(socket, watch)
        if self._moving:
            self._put(socket, Parcel.of(Leave()))
            socket.setsockopt(zmq.LINGER, _PARTING_MS)  # It may well be dead.
        elif self._state.attached:
            self._leave(socket)

    def _loop(self, socket: "zmq.Socket[bytes]", watch: Watch) -> None:
        poller = zmq.Poller()
        poller.register(watch.events, zmq.POLLIN)
        poller.register(self._bell.fileno(), zmq.POLLIN)
        look = 0.0
        self._act(socket, self._state.tick(time.monotonic()))
        while self._failure is None and not self._moving and not self._finished(time.monotonic()):
            # Where something could not leave, wake up as soon as it can: connected, or room again.
            poller.register(socket, zmq.POLLIN | zmq.POLLOUT if self._blocked else zmq.POLLIN)
            ready = dict(poller.poll(100))
            self._blocked = False
            if self._bell.fileno() in ready:
                self._bell.recv(4096)
            if ready.get(socket, 0) & zmq.POLLIN:
                self._drain(socket)
            if watch.events in ready:
                for failure in watch.failures():
                    self._act(socket, self._state.unshaken(failure, time.monotonic()))
            if (now := time.monotonic()) >= look:
                look = now + _LOOK_S
                self._state.felt(now - (quiet_for(watch.connection) or 0.0))
            self._act(socket, self._state.tick(time.monotonic()))
            self._flush(socket)
            if self._unserved.is_set():  # Last: nothing more is said to a broker that is left.
                self._unserved.clear()
                self._act(socket, self._state.elsewhere(time.monotonic()))

    def _leave(self, socket: "zmq.Socket[bytes]") -> None:
        """Say goodbye, and wait until the broker has read it and with it everything before."""
        self._put(socket, Parcel.of(Leave()))
        while (left := self._until - time.monotonic()) > 0 and socket.poll(int(left * 1000)):
            with contextlib.suppress(ProtocolError):
                header = Parcel.read(socket.recv_multipart(zmq.NOBLOCK, copy=False)).header
                if isinstance(header, Leave) or (isinstance(header, Error) and header.id == 0):
                    return

    def _finished(self, now: float) -> bool:
        """Whether to end: it was closed, and everything left or its time is up."""
        if not self._closing.is_set():
            self._until = now + _GOODBYE_S
            return False
        return not self._outbox or now > self._until

    def _drain(self, socket: "zmq.Socket[bytes]") -> None:
        for _ in range(_BURST):
            try:
                parcel = Parcel.read(socket.recv_multipart(zmq.NOBLOCK, copy=False))
            except zmq.Again:
                return
            except ProtocolError as error:
                Log("link").warn("message refused", why=str(error))
                continue
            self._act(socket, self._state.arrived(parcel, time.monotonic()))

    def _flush(self, socket: "zmq.Socket[bytes]") -> None:
        while self._state.attached and self._outbox:
            if not self._put(socket, self._outbox[0]):
                return
            parcel = self._outbox.popleft()
            self._act(socket, self._state.sent(parcel.header, parcel.size, time.monotonic()))

    def _act(self, socket: "zmq.Socket[bytes]", actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Transmit(header):
                    if not self._put(socket, Parcel.of(header)):
                        self._state.unsent()
                case Deliver(parcel):
                    self._inbox.put(parcel)
                case Connect(endpoint):
                    self._endpoint, self._moving = endpoint, True
                case Fail(error):
                    self._fail(error)

    def _fail(self, error: TrunklineError) -> None:
        self._failure = error
        self._inbox.put(error)

    def _put(self, socket: "zmq.Socket[bytes]", parcel: Parcel) -> bool:
        try:
            socket.send_multipart(parcel.frames(), zmq.NOBLOCK, copy=False)
        except zmq.Again:
            self._blocked = True
            return False
        return True


def _check_frames(parcel: Parcel) -> None:
    # ZeroMQ would end the connection that a larger frame comes on.
    largest = max((len(frame) for frame in parcel.tensors), default=0)
    if largest > MAX_FRAME_BYTES:
        raise FrameError(
            f"a tensor frame of {largest} bytes, {MAX_FRAME_BYTES} are allowed",
            hint="Use smaller micro-batches (--batch), or fewer tokens at once.",
        )
