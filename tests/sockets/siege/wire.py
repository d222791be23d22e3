"""Raw bytes at the broker's port: what is not even ZeroMQ, and what is and lies about sizes."""

import contextlib
import socket
import struct
from random import Random

from siege.tally import Tally

_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_READY = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
_HANDSHAKE = _GREETING + b"\x04" + bytes([len(_READY)]) + _READY
_OPEN = 40
"""Connections that are left half open at a time."""


class Wire:
    """Throws bytes at a TCP port. Half-open connections are kept until `close`, or until there are many."""

    def __init__(self, endpoint: str, tally: Tally) -> None:
        self._port = int(endpoint.rpartition(":")[2])
        self._tally = tally
        self._open: list[socket.socket] = []

    def play(self, rng: Random, number: int) -> None:
        """So many connections, each of which throws once."""
        for _ in range(number):
            self._throw(rng)

    def close(self) -> None:
        """Let go of all that are open."""
        while self._open:
            self._open.pop().close()

    def _throw(self, rng: Random) -> None:
        data = _bytes(rng)
        self._tally.threw("wire")
        try:
            peer = socket.create_connection(("127.0.0.1", self._port), 5)
        except OSError:
            self._tally.reactions["wire.not let in"] += 1
            return
        with contextlib.suppress(OSError):
            peer.sendall(data)
        if rng.random() < 0.3:
            self._tally.reactions["wire.left open"] += 1
            self._open.append(peer)
            if len(self._open) > _OPEN:
                self._open.pop(0).close()
            return
        peer.settimeout(0.005)
        how = "closed"
        try:
            while peer.recv(4096):
                pass
            how = "cut off"
        except TimeoutError:
            pass
        except OSError:
            how = "cut off"
        self._tally.reactions[f"wire.{how}"] += 1
        peer.close()


def _bytes(rng: Random) -> bytes:
    huge = struct.pack(">Q", rng.choice((1 << 28 | 1, 1 << 42, (1 << 63) - 1, (1 << 64) - 1)))
    match rng.randrange(10):
        case 0:
            return b""
        case 1:
            return rng.randbytes(rng.randrange(1, 200))
        case 2:
            return _GREETING[: rng.randrange(1, 64)]
        case 3:
            return _GREETING + rng.randbytes(rng.randrange(1, 300))
        case 4:
            return b"GET / HTTP/1.1\r\nHost: broker\r\n\r\n"
        case 5:  # A frame of up to 2^64 bytes, so it says, and the first of them.
            return _HANDSHAKE + bytes([rng.choice((2, 3))]) + huge + rng.randbytes(100)
        case 6:  # A command that is none, and one as large.
            return _HANDSHAKE + b"\x06" + huge
        case 7:  # Frames that say there are more, and none that is the last.
            return _HANDSHAKE + b"\x01\x01x" * rng.randrange(1, 2000)
        case 8:
            return _HANDSHAKE + bytes([rng.randrange(256)]) + rng.randbytes(rng.randrange(300))
        case _:
            return _HANDSHAKE[: rng.randrange(64, len(_HANDSHAKE))]
