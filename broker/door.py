"""The broker's door: it answers who may connect, and says who could not or left, on a thread of its own.

ZeroMQ asks over a socket (ZAP) and reports over another; neither is in the way of messages. The key
directory is looked at here too, a few times a second.
"""

import contextlib
import threading
import time
from collections.abc import Container, Iterable

import zmq

from broker.gate import DOMAIN, Gate
from broker.handshake import Failure, Watch
from broker.keyring import KeyRing
from broker.lines import Lines
from broker.parcel import Parcel
from codec.errors import RefusedError
from codec.logs import Log
from codec.messages import Attach, Status

_LOOK_MS = 250
_FAILED: dict[Failure, str] = {
    "mechanism": "it and this broker do not both use keys",
    "cryptographic": "it has another public key for this broker",
}


class Door:
    """Stands before a ROUTER socket that is not bound yet. Ends with the socket's context."""

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", socket: "zmq.Socket[bytes]", keys: KeyRing | None
    ) -> None:
        """With `keys` only their holders get in, without everybody."""
        self._keys = keys
        self._gate = Gate(keys) if keys else None
        self._log = Log("broker")
        self._quiet_until = 0.0
        self._lines = Lines()
        # Without anyone to ask, ZeroMQ would let everybody in: it is told to insist on an answer.
        self._questions = context.socket(zmq.REP)
        self._questions.bind("inproc://zeromq.zap.01")
        if keys:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.secret.encode())
            socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self._watch = Watch(socket)
        threading.Thread(target=self._run, name="door", daemon=True).start()

    def admit(self, route: bytes, frame: zmq.Frame, parcel: Parcel) -> Parcel:
        """What the router may believe of a message that came on `route`; `frame` is any of its frames.

        Raises `RefusedError` for an introduction or a question that its connection's key does not allow.
        """
        if isinstance(parcel.header, Attach):
            self._lines.attached(route, frame.get(zmq.MessageOption.SRCFD), time.monotonic())
        if self._gate is None or not isinstance(parcel.header, Attach | Status):
            return parcel
        key = str(frame.get("User-Id"))
        try:
            if isinstance(parcel.header, Status):
                self._gate.holder(key)
                return parcel
            return Parcel.of(self._gate.admit(route, key, parcel.header))
        except RefusedError as error:
            self._complain("refused", why=error.what)
            raise

    def doubtful(self) -> list[bytes]:
        """Routes whose connection seems to have ended for good: a message will tell."""
        ended = self._watch.ended
        return self._lines.doubtful([ended.popleft() for _ in range(len(ended))], time.monotonic())

    def quiet_for(self, route: bytes) -> float | None:
        """Seconds since the last byte of the peer at this route; None if that cannot be told."""
        return self._lines.quiet_for(route)

    def revoked(self, attached: Container[bytes]) -> Iterable[tuple[bytes, RefusedError]]:
        """Of the `attached` routes those whose key is allowed no longer, and what to tell them."""
        return self._gate.revoked(attached) if self._gate else ()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._questions, zmq.POLLIN)
        poller.register(self._watch.events, zmq.POLLIN)
        with self._questions, self._watch.events, contextlib.suppress(zmq.ContextTerminated):
            while True:
                ready = dict(poller.poll(_LOOK_MS if self._keys else None))
                if self._questions in ready:
                    self._answer()
                if self._watch.events in ready:
                    self._tell(self._watch.failures())
                if self._keys:
                    self._keys.refresh()

    def _answer(self) -> None:
        request = self._questions.recv_multipart()
        if self._gate is None:
            return
        reply, refused = self._gate.answer(request)
        self._questions.send_multipart(reply)
        if refused:
            self._complain("key refused", key=refused, address=request[3].decode())

    def _tell(self, failures: Iterable[Failure]) -> None:
        for failure in failures:
            if why := _FAILED.get(failure):
                self._complain("a peer could not connect", why=why)

    def _complain(self, event: str, **facts: str) -> None:
        """One line a second at most: strangers could fill the disk."""
        if time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + 1.0
            self._log.warn(event, **facts)
