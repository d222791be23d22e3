"""A hostile peer's socket: throws, listens, and sees that the broker still answers."""

import time
from collections.abc import Sequence
from types import TracebackType

import zmq
from siege.tally import Tally

from broker.parcel import Parcel
from codec.messages import AnyHeader, Error, Heartbeat, encode_header

DEADLINE_S = 20.0
"""The broker reads everything that came before within this time, or it hangs."""
_SYNC = 1 << 61


class Hang(Exception):  # noqa: N818 - what is told of the broker, not of the peer
    """The broker does not answer any more."""


class Peer:
    """One DEALER socket at an endpoint, as `who` in the tally."""

    def __init__(self, who: str, endpoint: str, tally: Tally) -> None:
        self.who, self._endpoint, self._tally = who, endpoint, tally
        self._context = zmq.Context.instance()
        self._syncs = _SYNC + 1
        self._sent = self._heard = 0
        self._connect()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._socket.close(0)

    def throw(self, frames: Sequence[bytes]) -> None:
        """Send one message; one that the socket cannot take now is not thrown."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=len(frames) < 3)
        except zmq.Again:
            return
        self._sent += 1
        self._tally.threw(self.who)

    def parcels(self, seconds: float = 0.0) -> list[Parcel]:
        """What came, for up to `seconds` until the first."""
        parcels: list[Parcel] = []
        if seconds and not self._socket.poll(int(seconds * 1000)):
            return parcels
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return parcels
            parcel = Parcel.read(frames)  # The broker sends what can be read, to whoever.
            header = parcel.header
            if not (isinstance(header, Heartbeat) and header.id > _SYNC):
                self._heard += 1
                self._tally.heard(self.who, header)
            parcels.append(parcel)

    def beat(self) -> None:
        """Give a sign of life, which counts for nothing."""
        self._socket.send_multipart([b"", encode_header(Heartbeat(id=_SYNC + 1))])

    def sync(self) -> None:
        """Wait until the broker has read everything. Raises `Hang`."""
        self._syncs += 1
        beat = encode_header(Heartbeat(id=self._syncs))
        until = time.monotonic() + DEADLINE_S
        again = 0.0
        while time.monotonic() < until:
            if time.monotonic() > again:  # It may have been on a connection that was cut off.
                again = time.monotonic() + 2.0
                self._socket.send_multipart([b"", beat])
            if any(_answers(parcel.header, self._syncs) for parcel in self.parcels(0.1)):
                dropped, self._sent, self._heard = self._sent - self._heard, 0, 0
                self._tally.reactions[f"{self.who}.dropped"] += max(0, dropped)
                return
        raise Hang(f"no answer to {self.who} in {DEADLINE_S:g} s")

    def _connect(self) -> None:
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 10)
        self._socket.setsockopt(zmq.SNDTIMEO, int(DEADLINE_S * 1000))
        self._socket.connect(self._endpoint)


def _answers(header: AnyHeader, number: int) -> bool:
    """The echo; or to a connection that is not attached, that it is not."""
    if isinstance(header, Error):
        return header.id == 0 and header.code in ("link", "refused")
    return isinstance(header, Heartbeat) and header.id == number
