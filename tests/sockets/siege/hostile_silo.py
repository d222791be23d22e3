"""A hostile silo: it throws what its arsenal has, and now and then floods."""

from collections.abc import Sequence
from random import Random

from siege.arsenal import Arsenal, Tensors
from siege.peer import Peer
from siege.tally import Tally

from codec.plan import ModelCard

_CHUNK = 50
"""Messages between two questions whether the broker still answers."""
_FLOODS = 0.04


def play(
    rng: Random,
    endpoint: str,
    tally: Tally,
    card: ModelCard,
    tensors: Tensors,
    others: Sequence[str],
    number: int,
) -> None:
    """A silo throws about `number` messages, and then vanishes or says goodbye."""
    arsenal = Arsenal(rng, card, tensors, others)
    stranger = rng.random() < 0.05
    attach = arsenal.attach()
    with Peer("silo", endpoint, tally) as peer:
        for at in range(0, number, _CHUNK):
            if not stranger:  # Again, since it may have left, or as somebody else.
                attach = arsenal.attach() if rng.random() < 0.3 else attach
                peer.throw(attach)
            flood = rng.random() < _FLOODS
            for _ in range(min(_CHUNK, number - at)):
                peer.throw(arsenal.flood() if flood else arsenal.throw())
                if not flood:
                    peer.parcels()
            peer.sync()
