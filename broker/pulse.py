"""Signs of life below messages: bytes that came over a connection.

Both ends have ZeroMQ ping (PING and PONG, rfc.zeromq.org/spec/37). Its own thread answers, even while
the interpreter is busy for seconds, and a process that was stopped does not. ZeroMQ's own timeout is not
used: it counts whole messages, and a large one on a slow line would break its own connection. The
kernel knows when the last byte came.
"""

import socket as sockets
import struct
import sys

import zmq

_LAST_DATA_RECEIVED = struct.Struct("52xI")
"""`tcpi_last_data_recv` of Linux's `struct tcp_info`, in milliseconds."""


def ping(socket: "zmq.Socket[bytes]", every: float) -> None:
    """Have ZeroMQ ping over each of the socket's later connections, `every` so many seconds."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, max(1, int(every * 1000)))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 0)


def is_gone(unheard: float, quiet: float, heartbeat: float, silence: float) -> bool:
    """Whether a peer is gone whose last message came `unheard` seconds ago, and last byte `quiet` seconds.

    After two heartbeats without a single byte it, or the way to it, is gone. After `silence` seconds
    without a message, three heartbeats at least, its program hangs: its machine may still answer.
    """
    return quiet > 2 * heartbeat or unheard > max(silence, 3 * heartbeat)


def quiet_for(connection: int | None) -> float | None:
    """Seconds since the last byte came over the connection with this file descriptor.

    None if that cannot be told: it has ended, or this is not Linux.
    """
    if connection is None or sys.platform != "linux":
        return None
    try:
        socket = sockets.socket(sockets.AF_INET, sockets.SOCK_STREAM, 0, fileno=connection)
        try:
            told = socket.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, _LAST_DATA_RECEIVED.size)
        finally:
            socket.detach()  # It is ZeroMQ's.
    except OSError:
        return None
    return float(_LAST_DATA_RECEIVED.unpack(told)[0]) / 1000 if len(told) == 56 else None
