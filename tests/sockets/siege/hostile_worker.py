"""A hostile worker, and the silo that trusts it: what it answers may be wrong, never more than an error."""

import threading
from collections.abc import Sequence
from random import Random
from typing import Any

from fuzzing.examples import example
from fuzzing.message import Message
from fuzzing.mutators import damage
from siege.arsenal import KINDS, Tensors
from siege.liar import Liar
from siege.peer import Peer
from siege.tally import Tally
from siege.victim import BLOCKS, Victim

from codec.messages import Attach, Drain, Gone, OpenSession, Request, Result, encode_header
from codec.plan import ModelCard

_ATTACHES: list[dict[str, Any]] = [
    {"model": None},
    {"start": 3, "stop": 3},
    {"stop": 4096},
    {"encodings": ()},
    {"credit": 1},
]


class HostileWorker:
    """Attaches with a model of its own, and says to others what they did not ask for."""

    def __init__(self, rng: Random, peer: Peer, tensors: Tensors, others: Sequence[bytes]) -> None:
        """`others` are aliases of silos that it has nothing to do with."""
        self._rng, self._peer, self._tensors = rng, peer, tensors
        self._others = list(others)
        self.card = ModelCard("hostile", f"{rng.random()}", 6, 64)

    def attach(self, **fields: Any) -> None:
        """Introduce itself."""
        given = {"model": self.card, "start": 0, "stop": 6, "credit": self._rng.choice((0, 1, 1 << 62))}
        attach = Attach(role="worker", name="w", peer=self._rng.randbytes(16), **{**given, **fields})
        self._peer.throw([b"", encode_header(attach)])

    def unasked(self) -> None:
        """Something that nobody waits for, or that is not a worker's to say."""
        rng = self._rng
        silo = rng.choice([*self._others, rng.randbytes(8), b"", b"x" * 64])
        match rng.randrange(40):
            case 0:
                self.attach(**rng.choice(_ATTACHES))
            case 1:
                self._peer.throw([silo, encode_header(rng.choice((Drain(), Gone(name="north"))))])
            case 2:
                header = OpenSession(id=1, session="s", model=self.card, rows=1, capacity=1, **BLOCKS)
                self._peer.throw([silo, encode_header(header)])
            case n if n < 10:
                self._peer.throw([silo, encode_header(example(rng.choice(KINDS), rng, tensors=()))])
            case _:
                spec, frame = self._tensors.draw(rng, 1)
                header = Result(id=rng.randrange(1, 400), tensors=(spec,))
                message = Message("result", (silo, encode_header(header), frame))
                self._peer.throw(
                    damage(rng, message, message).frames if rng.random() < 0.5 else message.frames
                )


def play(
    rng: Random, endpoint: str, tally: Tally, tensors: Tensors, others: Sequence[bytes], number: int
) -> None:
    """A hostile worker throws `number` messages, and answers its victim meanwhile."""
    with Peer("worker", endpoint, tally) as peer:
        worker = HostileWorker(rng, peer, tensors, others)
        liar = Liar(rng, tensors, peer.throw)
        worker.attach()
        peer.sync()
        victim = Victim(endpoint, tally)
        asking = threading.Thread(target=victim.ask, args=(worker.card, number // 12))
        asking.start()
        until = tally.thrown["worker"] + number
        while tally.thrown["worker"] < until or asking.is_alive():
            for parcel in peer.parcels(0.02):
                if isinstance(parcel.header, Request):
                    liar.answer(parcel.peer, parcel.header)
            if tally.thrown["worker"] < until:
                for _ in range(4):
                    worker.unasked()
            else:
                peer.beat()
        asking.join()
        peer.sync()
        victim.close()
