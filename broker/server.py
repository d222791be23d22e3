"""The broker's socket: one ROUTER, one poll loop, all decisions left to `broker.router`."""

import time
from collections import Counter
from dataclasses import dataclass, field
from threading import Event

import zmq

from broker.door import Door
from broker.endpoint import check_endpoint, is_ipv6
from broker.keyring import KeyRing
from broker.parcel import Parcel, error_parcel
from broker.pulse import ping
from broker.router import Router, Send
from codec.errors import ProtocolError, RefusedError, UsageError
from codec.limits import MAX_FRAME_BYTES
from codec.logs import Log
from codec.messages import Heartbeat

_TICK_MS = 50
_STOOD_S = 1.0
_PROBE = Parcel.of(Heartbeat())
_LAST = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_QUEUE = 1 << 14
"""Messages that may wait for one peer. Quotas bound what silos send to a worker long before; a peer
that sends rubbish and reads nothing stops here."""


@dataclass(slots=True)
class Traffic:
    """What passed since the start, by message kind."""

    messages: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    refused: int = 0

    def count(self, kind: str, size: int) -> None:
        """One routed message with `size` bytes of tensors."""
        self.messages[kind] += 1
        self.bytes[kind] += size


class Server:
    """A bound broker. `endpoint` is where it listens; port 0 becomes a free one.

    With `keys` it lets in only whom they allow.
    """

    def __init__(self, listen: str, router: Router, keys: KeyRing | None = None) -> None:
        """Bind. Raises `UsageError` if the address is bad, taken, or beyond loopback without `keys`."""
        check_endpoint(listen, free_port=True, keys=keys is not None)
        self.router = router
        router.registry.keyed = keys is not None
        self.traffic = Traffic()
        self._attached = 0
        self._log = Log("broker")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDHWM, _QUEUE)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.IPV6, is_ipv6(listen))
        # What `send` is without the options of sockets that are not a ROUTER: half the time.
        self._transmit = super(zmq.Socket, self._socket).send
        ping(self._socket, router.limits.heartbeat / 2)
        self._door = Door(self._context, self._socket, keys)
        host, _, port = listen.rpartition(":")
        try:
            self._socket.bind(listen if int(port) else f"{host}:*")
        except zmq.ZMQError as error:
            self.close()
            raise UsageError(
                f"the broker cannot listen on {listen}: {error.strerror or error}",
                side="broker",
                hint="Another process may hold the port; choose another with --listen.",
            ) from None
        self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def close(self) -> None:
        """Stop listening; the port is free when this returns. `serve` does so at its end.

        What was routed still leaves, within half a second.
        """
        if not self._socket.closed:
            self._socket.disable_monitor()
        self._socket.close()
        self._context.term()

    def serve(self, stop: Event) -> None:
        """Route until `stop` is set, then tell all peers and close the socket.

        Nothing is waited for: what a session or run needs to go on elsewhere its silo has.
        """
        self._socket.setsockopt(zmq.RCVTIMEO, _TICK_MS)
        due = time.monotonic()
        try:
            while not stop.is_set():
                try:
                    route, frames = self._receive()
                except zmq.Again:
                    now = time.monotonic()
                else:
                    now = time.monotonic()
                    self._route(route, frames, now)
                if now >= due + _STOOD_S:
                    due = now + _STOOD_S  # This process was stopped: first it reads what came meanwhile.
                elif now >= due:
                    due = now + _TICK_MS / 1000
                    self._send([Send(route, _PROBE) for route in self._door.doubtful()])
                    self._send(self.router.tick(now, self._door.quiet_for))
                    self._revoke()
            self._send(self.router.farewell())
        finally:
            self.close()

    def _receive(self) -> tuple[bytes, list[zmq.Frame]]:
        """The route that a message came on, which is never alone, and its frames.

        As `recv_multipart` does, in a third of the time: that asks the socket after each frame.
        """
        receive = self._socket.recv
        route = receive()
        frame = receive(copy=False)
        frames = [frame]
        while frame.more:
            frame = receive(copy=False)
            frames.append(frame)
        return route, frames

    def _route(self, route: bytes, frames: list[zmq.Frame], now: float) -> None:
        try:
            parcel = self._door.admit(route, frames[0], Parcel.read(frames))
        except (ProtocolError, RefusedError) as error:
            self.traffic.refused += isinstance(error, ProtocolError)
            self._send([Send(route, error_parcel(0, error))])
            return
        self._send(self.router.handle(route, parcel, now))
        if len(self.router.peers) != self._attached:
            self._attached = len(self.router.peers)
            self._log.say("peers", attached=self._attached)

    def _revoke(self) -> None:
        """Forget who was let in with a key that is not allowed any more."""
        for route, error in self._door.revoked(self.router.peers):
            self._log.say("revoked", peer=self.router.peers[route].name)
            self._send([Send(route, error_parcel(0, error)), *self.router.lost(route)])

    def _send(self, sends: list[Send]) -> None:
        for send in sends:
            parcel = send.parcel
            self.traffic.count(type(parcel.header).__name__, parcel.size)
            try:
                self._put(send.route, parcel)
            except zmq.ZMQError as error:
                # Unreachable, or so slow that its queue is full: either way it cannot be served.
                if send.route in self.router.peers:
                    self._log.warn("peer lost", why=error.strerror)
                    self._send(self.router.lost(send.route))

    def _put(self, route: bytes, parcel: Parcel) -> None:
        """One message. As `send_multipart` does, which looks at every frame first."""
        send, tensors = self._transmit, parcel.tensors
        send(route, _MORE)
        send(parcel.peer, _MORE)
        send(parcel.raw, _MORE if tensors else _LAST)
        for left, tensor in enumerate(tensors, 1 - len(tensors)):
            send(tensor, _MORE if left else _LAST, copy=False)
