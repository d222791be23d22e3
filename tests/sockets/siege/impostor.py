"""A hostile broker: it lets a worker and a silo attach, and tells them what no broker says."""

import threading
import time
from collections.abc import Sequence
from random import Random

import zmq
from siege.arsenal import Arsenal, Tensors
from siege.liar import Liar, ends_a_link
from siege.peer import DEADLINE_S, Hang
from siege.tally import Tally
from siege.victim import Victim

from broker.parcel import Parcel
from codec.errors import ProtocolError
from codec.messages import (
    AnyHeader,
    Attach,
    CloseSession,
    Error,
    Gone,
    Heartbeat,
    Request,
    Welcome,
    encode_header,
)
from codec.plan import ModelCard

_SYNC = b"syncsync"
_CHUNK = 100


class Impostor:
    """A ROUTER socket. Whoever attaches as a worker is asked, and whoever does as a silo is answered."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._socket = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self.endpoint = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._worker = self._route = b""
        self._victim: Victim | None = None
        self._syncs = 0
        self._synced = 0

    def play(self, rng: Random, card: ModelCard, tensors: Tensors, number: int) -> None:
        """Throw so many messages at the worker, and answer a silo meanwhile. Raises `Hang`."""
        liar = Liar(rng, tensors, lambda frames: self._put(self._route, frames))
        self._await_worker(liar)
        victim = self._victim = self._victim or Victim(self.endpoint, self._tally)
        asking = threading.Thread(target=victim.ask, args=(card, number // 40))
        asking.start()
        arsenals = [(rng.randbytes(8), Arsenal(rng, card, tensors, ["x"])) for _ in range(3)]
        for at in range(0, number, _CHUNK):
            for _ in range(min(_CHUNK, number - at)):
                silo, arsenal = rng.choice(arsenals)
                if rng.random() < 0.03:
                    self._put(self._worker, [silo, encode_header(rng.choice(_CONTROL))])
                else:
                    self._put(self._worker, [silo, *arsenal.throw()[1:]])
                self._serve(liar, 0)
            self._sync(liar)
        while asking.is_alive():
            self._serve(liar, 0.05)
        asking.join()
        for silo, _ in arsenals:
            self._put(self._worker, [silo, encode_header(Gone(name="hostile"))])
        self._sync(liar)

    def close(self) -> None:
        """End."""
        if self._victim is not None:
            self._victim.close()
        self._socket.close()

    def _put(self, route: bytes, frames: Sequence[bytes]) -> None:
        """Send, unless it would end the link in good order."""
        try:
            if ends_a_link(Parcel.read(frames).header):
                return
        except ProtocolError:
            pass
        self._socket.send_multipart([route, *frames], copy=len(frames) < 3)
        self._tally.threw("impostor")

    def _await_worker(self, liar: Liar) -> None:
        until = time.monotonic() + 60
        while not self._worker:
            if time.monotonic() > until:
                raise Hang("no worker attached to the impostor")
            self._serve(liar, 0.2)

    def _sync(self, liar: Liar) -> None:
        """Wait until the worker answers what comes last. Raises `Hang`."""
        self._syncs += 1
        until, again = time.monotonic() + DEADLINE_S, 0.0
        while self._synced < self._syncs:
            if time.monotonic() > until:
                raise Hang(f"no answer of the worker in {DEADLINE_S:g} s")
            if time.monotonic() > again:  # It may have been lost with a connection.
                again = time.monotonic() + 3.0
                header = encode_header(CloseSession(id=self._syncs, session="sync"))
                self._socket.send_multipart([self._worker, _SYNC, header])
            self._serve(liar, 0.05)

    def _serve(self, liar: Liar, seconds: float) -> None:
        """Take in what came: introductions, signs of life, the worker's answers, the silo's requests."""
        wait = int(seconds * 1000)
        while self._socket.poll(wait):
            wait = 0
            route, *frames = self._socket.recv_multipart()
            parcel = Parcel.read(frames)  # Ours say what can be read, whatever they are told.
            self._hear(liar, route, parcel.peer, parcel.header)

    def _hear(self, liar: Liar, route: bytes, peer: bytes, header: AnyHeader) -> None:
        match header:
            case Attach(role="worker"):
                self._worker = route
                self._socket.send_multipart([route, b"", encode_header(Welcome(heartbeat=1.0))])
            case Attach():
                self._socket.send_multipart([route, b"", encode_header(Welcome(heartbeat=1.0))])
            case Heartbeat():
                self._socket.send_multipart([route, b"", encode_header(header)])
            case _ if isinstance(header, Request):
                self._route = route
                liar.answer(b"", header)
            case Error() if peer == _SYNC:
                self._synced = max(self._synced, header.id)
            case _:
                self._tally.heard("impostor", header)


_CONTROL: list[AnyHeader] = [
    Welcome(heartbeat=0.5),
    Welcome(heartbeat=1.0, resumed=True, encodings=()),
    Error(id=0, code="link", what="attach", side="broker"),
    Gone(name="nobody"),
    Heartbeat(id=7),
    Attach(role="silo", name="s", peer=bytes(16)),
]
