"""A worker that computes nothing: it decodes what comes and sends it back as it is asked to."""

import secrets
from threading import Event

import msgspec

from broker.link import ZmqLink
from broker.parcel import Parcel
from codec.messages import (
    Attach,
    Backward,
    Done,
    Extend,
    Forward,
    Opened,
    OpenRun,
    OpenSession,
    Request,
    Result,
)
from codec.plan import ModelCard
from codec.tensors import decode_tensors, encode_tensors

_WAIT_S = 0.25


def echo_card(hidden: int) -> ModelCard:
    """The card of a model that does not exist, for silos that talk to an echo."""
    return ModelCard(name="echo", fingerprint="echo", blocks=3, hidden=hidden)


def serve_echo(endpoint: str, hidden: int, stop: Event) -> None:
    """Serve until `stop` is set. Raises the link's error."""
    attach = Attach(
        role="worker", name="echo", peer=secrets.token_bytes(16), model=echo_card(hidden), start=0, stop=3
    )
    link = ZmqLink(endpoint, attach)
    try:
        while not stop.is_set():
            parcel = link.receive(_WAIT_S)
            if parcel is not None and isinstance(parcel.header, Request):
                link.send(_answer(parcel))
    finally:
        link.close()


def _answer(parcel: Parcel) -> Parcel:
    request = parcel.header
    if isinstance(request, OpenSession | OpenRun):
        return Parcel.of(Opened(id=request.id), peer=parcel.peer)
    if not isinstance(request, Extend | Forward | Backward):
        return Parcel.of(Done(id=request.id), peer=parcel.peer)
    tensors = decode_tensors(request.tensors, parcel.buffers(), boundary="echo")
    gradient = isinstance(request, Backward)
    specs, frames = encode_tensors(tensors, request.wire, "echo", stochastic=gradient)
    return Parcel.of(msgspec.structs.replace(Result(id=request.id), tensors=specs), frames, parcel.peer)
