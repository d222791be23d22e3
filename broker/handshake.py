"""Why connections fail, and when they end. ZeroMQ keeps it to itself unless it is watched."""

import socket as sockets
import time
from collections import deque
from typing import Literal

import zmq
from zmq.utils.monitor import recv_monitor_message

Failure = Literal["refused", "mechanism", "cryptographic", "cut", "unreachable", "broken"]
"""The broker refused the key; one side uses keys and the other none; a box could not be opened (seen by
the broker alone, where the peer has another broker's public key); a broker hung up; nobody listens there;
a connection that stood has ended (the last two are seen by who connects)."""

_CONNECTIONS = zmq.Event.CONNECTED | zmq.Event.CLOSED
_EVENTS = (
    zmq.Event.DISCONNECTED
    | zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
)
_PROTOCOL: dict[int, Failure] = {
    zmq.Event.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH: "mechanism",
    zmq.Event.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC: "cryptographic",
}
_REFUSED = 400
"""ZAP's status for a key that is not allowed."""

_PROBE_S = 0.25
"""At most one question of our own in this time."""

_PATIENCE_S = 1.0
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03"
"""What a ZMTP 3 peer says first; the rest of its greeting may wait (rfc.zeromq.org/spec/23)."""


class Watch:
    """The failed and ended connections of one socket. Poll `events`; close it before the socket.

    A socket that connects gives its `endpoint`. Whichever side finds first that only one of them uses
    keys hangs up, and the other would never know why: so who listens there is asked.
    """

    def __init__(self, socket: "zmq.Socket[bytes]", endpoint: str = "") -> None:
        self._socket = socket
        self._endpoint = endpoint
        self._asked = 0.0
        self.connection: int | None = None
        """The file descriptor of who connected."""
        self.ended: deque[int] = deque()
        """Those of the connections of who listens that have ended; whoever wants to know empties it."""
        self.events: zmq.Socket[bytes] = socket.get_monitor_socket(
            _EVENTS | _CONNECTIONS if endpoint else _EVENTS
        )

    def failures(self) -> list[Failure]:
        """What happened since the last call."""
        found: list[Failure] = []
        while self.events.poll(0):
            message = recv_monitor_message(self.events)
            event, value = message["event"], message["value"]
            if event == zmq.Event.HANDSHAKE_FAILED_AUTH and value == _REFUSED:
                found.append("refused")
            elif event == zmq.Event.HANDSHAKE_FAILED_PROTOCOL and value in _PROTOCOL:
                found.append(_PROTOCOL[value])
            elif event == zmq.Event.HANDSHAKE_FAILED_NO_DETAIL:
                found += self._cut()
            elif event == zmq.Event.CONNECTED:
                self.connection = value
            elif event == zmq.Event.CLOSED:
                found.append("unreachable")
            elif event == zmq.Event.DISCONNECTED:
                found += self._ended(value)
        return found

    def _ended(self, connection: int) -> list[Failure]:
        if not self._endpoint:
            self.ended.append(connection)
            return []
        self.connection = None
        return ["broken"]

    def _cut(self) -> list[Failure]:
        """What it means that the other side hung up: nothing if it is no broker, or none is there yet."""
        if not self._endpoint or time.monotonic() - self._asked < _PROBE_S:
            return []
        theirs = mechanism(self._endpoint)
        self._asked = time.monotonic()
        if theirs is None:
            return []
        ours = "NULL" if self._socket.mechanism == zmq.SecurityMechanism.NULL else "CURVE"
        return ["cut" if theirs == ours else "mechanism"]

    def close(self) -> None:
        """Stop watching."""
        if not self.events.closed:
            self._socket.disable_monitor()
            self.events.close(0)


def mechanism(endpoint: str) -> str | None:
    """How who listens there secures its connections, NULL or CURVE; None if nobody says so in a second."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    deadline, heard = time.monotonic() + _PATIENCE_S, b""
    try:
        with sockets.create_connection((host.strip("[]"), int(port)), _PATIENCE_S) as peer:
            peer.sendall(_GREETING)
            while len(heard) < 32:
                peer.settimeout(max(0.001, deadline - time.monotonic()))
                more = peer.recv(32 - len(heard))
                if not more:
                    return None
                heard += more
    except OSError:
        return None
    signature, name = heard[:1] + heard[9:10], heard[12:].rstrip(b"\0")
    return name.decode("ascii", "replace") if signature == b"\xff\x7f" else None
