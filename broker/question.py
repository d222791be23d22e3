"""Asking a broker how its pool is: one message there and one back, without attaching."""

import contextlib
import time

import zmq

from broker.endpoint import check_endpoint, is_ipv6, no_answer
from broker.handshake import Failure, Watch
from broker.keys import LinkKeys
from broker.parcel import Parcel, error_in
from codec.errors import ProtocolError, RefusedError
from codec.limits import MAX_FRAME_BYTES
from codec.messages import Error, Pool, Status

_WHY: dict[Failure, str] = {
    "refused": "this key is not allowed there, or was revoked",
    "mechanism": "one side uses keys and the other none (--key, --broker-key)",
    "cut": "it has not the key that --broker-key names",
}


def ask_pool(endpoint: str, timeout: float, keys: LinkKeys | None = None) -> Pool:
    """What the broker at `endpoint` says of its pool, within `timeout` seconds.

    Raises `UsageError` for an endpoint that is none, `RefusedError` if the broker does not let this
    side in, `LinkError` if it does not answer.
    """
    check_endpoint(endpoint, keys=keys is not None)
    until = time.monotonic() + timeout
    context: zmq.Context[zmq.Socket[bytes]]
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, is_ipv6(endpoint))
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        if keys is not None:
            keys.guard(socket)
        with contextlib.closing(Watch(socket, endpoint)) as watch:
            socket.connect(endpoint)
            socket.send_multipart(Parcel.of(Status(id=1)).frames())
            poller = zmq.Poller()
            poller.register(socket, zmq.POLLIN)
            poller.register(watch.events, zmq.POLLIN)
            while (left := until - time.monotonic()) > 0:
                ready = dict(poller.poll(int(left * 1000) + 1))
                if socket in ready and (pool := _answer(socket)) is not None:
                    return pool
                failures = watch.failures() if watch.events in ready else []
                if why := next((_WHY[failure] for failure in failures if failure in _WHY), None):
                    raise RefusedError(f"the broker at {endpoint} lets this side not in: {why}")
    raise no_answer([endpoint], f"within {timeout:g} s")


def _answer(socket: "zmq.Socket[bytes]") -> Pool | None:
    """The answer, if this is it. Raises what the broker answered with instead."""
    try:
        header = Parcel.read(socket.recv_multipart(zmq.NOBLOCK, copy=False)).header
    except ProtocolError:
        return None
    if isinstance(header, Error):
        raise error_in(header)
    return header if isinstance(header, Pool) else None
