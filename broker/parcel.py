"""A message in transit: a header, its raw bytes, and tensor frames that nobody here looks into."""

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from codec.errors import ProtocolError, TrunklineError, from_code
from codec.limits import MAX_HEADER_BYTES, MAX_TENSORS
from codec.messages import AnyHeader, Error, decode_header, encode_header

Frames = Sequence[Any]
"""Tensor frames: bytes-like objects or `zmq.Frame`s, passed on untouched."""

_MAX_PEER_BYTES = 64


class Parcel(Struct, frozen=True):
    """One message. `peer` names the silo it comes from or goes to, where that is not implied."""

    peer: bytes
    header: AnyHeader
    raw: bytes
    tensors: Frames = ()

    @classmethod
    def of(cls, header: AnyHeader, tensors: Frames = (), peer: bytes = b"") -> "Parcel":
        """A new message."""
        return cls(peer, header, encode_header(header), tensors)

    @classmethod
    def read(cls, frames: Sequence[Any]) -> "Parcel":
        """From multipart frames `[peer][header][tensor]...`. Raises `ProtocolError`."""
        if not 2 <= len(frames) <= 2 + MAX_TENSORS:
            raise ProtocolError(
                f"a message of {len(frames)} frames; a peer frame, a header and at most "
                f"{MAX_TENSORS} tensors are needed"
            )
        if len(frames[0]) > _MAX_PEER_BYTES or len(frames[1]) > MAX_HEADER_BYTES:
            raise ProtocolError(f"a peer frame of {len(frames[0])} bytes, a header of {len(frames[1])}")
        peer, raw = bytes(frames[0]), bytes(frames[1])
        return cls(peer, decode_header(raw), raw, tuple(frames[2:]))

    def frames(self) -> list[Any]:
        """Multipart frames for the wire."""
        return [self.peer, self.raw, *self.tensors]

    def to(self, peer: bytes) -> "Parcel":
        """The same message with another peer frame; the header is not encoded again."""
        return Parcel(peer, self.header, self.raw, self.tensors)

    def buffers(self) -> list[memoryview]:
        """The tensor frames' memory, without a copy."""
        return [_memory(frame) for frame in self.tensors]

    @property
    def size(self) -> int:
        """Bytes of all tensor frames."""
        return sum(map(len, self.tensors))


def error_parcel(request: int, error: TrunklineError) -> Parcel:
    """An error as the answer to `request`; 0 for one that concerns the connection."""
    return Parcel.of(Error(id=request, code=error.code, what=error.what, side=error.at, hint=error.hint))


def error_in(header: Error) -> TrunklineError:
    """The error that another side told of."""
    return from_code(header.code, header.what, header.hint, header.side)


def _memory(frame: Any) -> memoryview:
    return memoryview(frame.buffer if hasattr(frame, "buffer") else frame)
