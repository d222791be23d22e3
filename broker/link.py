"""The link: how silos and workers talk to the broker, over ZeroMQ, on a thread of its own.

The owner's thread computes; the link's thread moves frames, beats and re-attaches meanwhile.
"""

import contextlib
import os
import queue
import threading
import time
from collections import deque
from typing import Protocol

import zmq

from broker.endpoint import check_endpoint
from broker.link_state import Action, Deliver, Fail, LinkState, Transmit
from broker.parcel import Parcel
from codec.errors import ProtocolError, TrunklineError
from codec.limits import MAX_FRAME_BYTES
from codec.logs import Log
from codec.messages import Attach, Leave


class Link(Protocol):
    """A connection to a broker. `send` and `receive` may be called from different threads."""

    def send(self, parcel: Parcel) -> None:
        """Queue a message. Order is kept. Raises the link's error once it has failed."""

    def receive(self, timeout: float) -> Parcel | None:
        """The next message, or None after `timeout` seconds. Raises the link's error if it failed."""

    def close(self) -> None:
        """Say goodbye and end. Messages already sent are still delivered, within half a second."""


class ZmqLink:
    """A link over TCP. Attaches by itself, and again after every loss, for `patience` seconds."""

    def __init__(self, endpoint: str, attach: Attach, *, patience: float = 30.0) -> None:
        """Start connecting; nothing is awaited. Raises `UsageError` for a malformed endpoint."""
        check_endpoint(endpoint)
        self._endpoint = endpoint
        self._state = LinkState(attach, endpoint, patience, time.monotonic())
        self._inbox: queue.SimpleQueue[Parcel | TrunklineError] = queue.SimpleQueue()
        self._outbox: deque[Parcel] = deque()
        self._failure: TrunklineError | None = None
        self._closing = threading.Event()
        self._bell_out, self._bell_in = os.pipe()
        os.set_blocking(self._bell_in, False)
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)
        self._thread.start()

    def send(self, parcel: Parcel) -> None:
        """See `Link.send`."""
        if self._failure is not None:
            raise self._failure
        self._outbox.append(parcel)
        self._ring()

    def receive(self, timeout: float) -> Parcel | None:
        """See `Link.receive`."""
        try:
            item = self._inbox.get(timeout=max(0.0, timeout))
        except queue.Empty:
            if self._failure is not None:
                raise self._failure from None
            return None
        if isinstance(item, TrunklineError):
            raise item
        return item

    def close(self) -> None:
        """See `Link.close`."""
        if not self._closing.is_set():
            self._closing.set()
            self._ring()
            self._thread.join(2.0)
            os.close(self._bell_in)

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # The pipe is full of rings already, or the thread is gone.
            os.write(self._bell_in, b"!")

    def _run(self) -> None:
        socket: zmq.Socket[bytes]
        with zmq.Context.instance().socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 500)
            socket.setsockopt(zmq.IMMEDIATE, 1)  # Nothing is queued for a broker that is not there.
            socket.setsockopt(zmq.RECONNECT_IVL, 50)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
            socket.connect(self._endpoint)
            try:
                self._loop(socket)
            except Exception as error:  # The owner must hear of it: it would wait for ever.
                Log("link").failed("the link broke")
                self._fail(TrunklineError(f"the link broke: {error}"))
            finally:
                os.close(self._bell_out)

    def _loop(self, socket: "zmq.Socket[bytes]") -> None:
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._bell_out, zmq.POLLIN)
        self._act(socket, self._state.tick(time.monotonic()))
        while self._failure is None and not self._closing.is_set():
            ready = dict(poller.poll(100))
            if self._bell_out in ready:
                os.read(self._bell_out, 4096)
            if socket in ready:
                self._drain(socket)
            self._act(socket, self._state.tick(time.monotonic()))
            self._flush(socket)
        if self._state.attached:
            self._flush(socket)
            self._put(socket, Parcel.of(Leave()))

    def _drain(self, socket: "zmq.Socket[bytes]") -> None:
        while True:
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
            self._outbox.popleft()

    def _act(self, socket: "zmq.Socket[bytes]", actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Transmit(header):
                    self._put(socket, Parcel.of(header))
                case Deliver(parcel):
                    self._inbox.put(parcel)
                case Fail(error):
                    self._fail(error)

    def _fail(self, error: TrunklineError) -> None:
        self._failure = error
        self._inbox.put(error)

    def _put(self, socket: "zmq.Socket[bytes]", parcel: Parcel) -> bool:
        try:
            socket.send_multipart(parcel.frames(), zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True
