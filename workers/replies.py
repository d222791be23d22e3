"""What a request caused, as the messages that go back."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from torch import Tensor

from broker.parcel import Parcel, error_parcel
from codec.errors import FrameError, TrunklineError
from codec.logs import Log
from codec.messages import AnyHeader, Wire, kind_of
from codec.tensors import encode_tensors


@dataclass(frozen=True, slots=True)
class Reply:
    """What a request caused: tensors for `silo`, encoded as `wire` says."""

    silo: bytes
    header: AnyHeader
    tensors: Sequence[Tensor] = ()
    wire: Wire = "exact"
    stochastic: bool = False


def encoded(reply: Reply) -> Parcel:
    """The reply as a message; one whose tensors cannot cross becomes an error."""
    if not reply.tensors:
        return Parcel.of(reply.header, peer=reply.silo)
    try:
        specs, frames = encode_tensors(
            reply.tensors, reply.wire, f"worker's {kind_of(reply.header)}", stochastic=reply.stochastic
        )
    except FrameError as error:
        trouble: TrunklineError = FrameError(error.what, hint=error.hint, side="worker")
        return error_parcel(reply.header.id, trouble).to(reply.silo)
    except Exception as error:
        Log("worker").failed("answer not packed", kind=kind_of(reply.header))
        return error_parcel(reply.header.id, unexpected(error)).to(reply.silo)
    return Parcel.of(msgspec.structs.replace(reply.header, tensors=specs), frames, reply.silo)


def unexpected(error: Exception) -> TrunklineError:
    """What a silo is told of an error that nobody foresaw."""
    what = f"the worker failed: {type(error).__name__}: {error}"
    return TrunklineError(what, side="worker", hint="See its log.")


def error_header(request: int, error: TrunklineError) -> AnyHeader:
    """An error as the answer to `request`."""
    return error_parcel(request, error).header
