"""The broker's socket: one ROUTER, one poll loop, all decisions left to `broker.router`."""

import time
from dataclasses import dataclass, field
from threading import Event

import zmq

from broker.endpoint import check_endpoint, is_ipv6
from broker.parcel import Parcel, error_parcel
from broker.router import Router, Send
from codec.errors import ProtocolError, UsageError
from codec.limits import MAX_FRAME_BYTES
from codec.logs import Log

_TICK_MS = 250
_QUEUE = 1 << 14
"""Messages that may wait for one peer. Quotas bound what silos send to a worker long before; a peer
that sends rubbish and reads nothing stops here."""


@dataclass(slots=True)
class Traffic:
    """What passed since the start, by message kind."""

    messages: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    refused: int = 0

    def count(self, kind: str, size: int) -> None:
        """One routed message with `size` bytes of tensors."""
        self.messages[kind] = self.messages.get(kind, 0) + 1
        self.bytes[kind] = self.bytes.get(kind, 0) + size


class Server:
    """A bound broker. `endpoint` is where it listens; port 0 becomes a free one."""

    def __init__(self, listen: str, router: Router) -> None:
        """Bind. Raises `UsageError` if the address is bad, taken, or beyond loopback."""
        check_endpoint(listen, free_port=True)
        self.router = router
        self.traffic = Traffic()
        self._log = Log("broker")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDHWM, _QUEUE)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.IPV6, is_ipv6(listen))
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
        self._socket.close()
        self._context.term()

    def serve(self, stop: Event) -> None:
        """Route until `stop` is set, then close the socket."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        due = time.monotonic()
        try:
            while not stop.is_set():
                if poller.poll(_TICK_MS):
                    self._drain()
                if time.monotonic() >= due:
                    due = time.monotonic() + _TICK_MS / 1000
                    self._send(self.router.tick(time.monotonic()))
        finally:
            self.close()

    def _drain(self) -> None:
        """Everything that waits, up to a bound so that ticks happen under load."""
        for _ in range(256):
            try:
                route, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                parcel = Parcel.read(frames)
            except ProtocolError as error:
                self.traffic.refused += 1
                self._send([Send(route.bytes, error_parcel(0, error))])
                continue
            attached = len(self.router.peers)
            sends = self.router.handle(route.bytes, parcel, time.monotonic())
            self._send(sends)
            if len(self.router.peers) != attached:
                self._log.say("peers", attached=len(self.router.peers))

    def _send(self, sends: list[Send]) -> None:
        for send in sends:
            parcel = send.parcel
            self.traffic.count(type(parcel.header).__name__, parcel.size)
            try:
                self._socket.send_multipart([send.route, *parcel.frames()], zmq.NOBLOCK, copy=False)
            except zmq.ZMQError as error:
                # Unreachable, or so slow that its queue is full: either way it cannot be served.
                if send.route in self.router.peers:
                    self._log.warn("peer lost", why=error.strerror)
                    self._send(self.router.lost(send.route))
