"""What peers are called, and what they must say of themselves."""

import pytest

from broker.pool import Worker, alias_of, check_attach, common_encodings
from codec.errors import MismatchError
from codec.messages import ENCODINGS, Attach, Encodings
from codec.plan import ModelCard

CARD = ModelCard(name="tiny", fingerprint="f", blocks=6, hidden=4)


def test_an_alias_does_not_give_the_identity_away() -> None:
    secret = bytes(range(16))
    assert alias_of(secret) == alias_of(secret)
    assert alias_of(secret) != alias_of(secret[::-1])
    assert not any(part in alias_of(secret) for part in (secret[:4], secret[4:8], secret[8:12]))


def test_what_a_pool_reads_is_what_all_of_it_reads() -> None:
    old, new = reading("raw", "steps"), reading(*ENCODINGS)
    assert common_encodings([]) == ENCODINGS == common_encodings([new.encodings])
    assert common_encodings([new.encodings, old.encodings]) == ("raw", "steps")


def reading(*encodings: str) -> Worker:
    worker = Worker(b"w")
    worker.says(attach("worker", encodings))  # type: ignore[arg-type]
    return worker


def attach(role: str, encodings: Encodings) -> Attach:
    return Attach(role=role, name="n", peer=bytes(16), encodings=encodings, model=CARD, stop=6)  # type: ignore[arg-type]


@pytest.mark.parametrize("role", ["silo", "worker"])
def test_a_peer_reads_the_plain_encodings_at_least(role: str) -> None:
    check_attach(attach(role, ("raw", "planes")))
    for few in ((), ("raw",), ("steps", "blocks")):
        with pytest.raises(MismatchError, match="every peer must read raw and planes") as caught:
            check_attach(attach(role, few))  # type: ignore[arg-type]
        assert caught.value.at == role


def test_a_worker_that_grants_nothing_takes_everything() -> None:
    worker = Worker(b"w")
    worker.says(Attach(role="worker", name="n", peer=bytes(16), model=CARD, stop=6, credit=5))
    assert worker.inbox.credit == 5
    worker.says(Attach(role="worker", name="n", peer=bytes(16), model=CARD, stop=6))
    assert worker.inbox.credit > 1 << 62
