"""Which worker gets a request, and what is said when none can."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.pool import Peer, alias_of, choose_worker, common_encodings, peer_from
from codec.errors import MismatchError, UnavailableError
from codec.messages import ENCODINGS, Attach
from codec.partition import Span
from codec.plan import ModelCard

CARD = ModelCard(name="tiny", fingerprint="f", blocks=6, hidden=4, samples={2: "aa", 3: "bb"})


def worker(name: str, start: int = 0, stop: int = 6, load: int = 0, model: ModelCard = CARD) -> Peer:
    return Peer(name.encode(), name.encode(), "worker", name, 0.0, model, Span(start, stop), load)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_the_least_loaded_worker_is_chosen(loads: list[int]) -> None:
    pool = [worker(str(i), load=load) for i, load in enumerate(loads)]
    assert choose_worker(pool, CARD, Span(1, 5), ()).load == min(loads)


def test_only_workers_that_host_every_block_are_chosen() -> None:
    pool = [worker("short", 2, 4), worker("late", 3, 6), worker("fits", 1, 5, load=99)]
    assert choose_worker(pool, CARD, Span(2, 5), ()).name == "fits"
    assert choose_worker(pool, CARD, Span(2, 4), ()).name == "short"


def test_only_workers_with_the_same_model_are_chosen() -> None:
    other = ModelCard(name="tiny", fingerprint="other", blocks=6, hidden=4)
    tuned = ModelCard(name="tiny", fingerprint="f", blocks=6, hidden=4, samples={3: "zz"})
    pool = [worker("other", model=other), worker("tuned", model=tuned), worker("same", load=9)]
    assert choose_worker(pool, CARD, Span(0, 6), ()).name == "same"


def test_an_empty_pool_is_unavailable_and_says_how_to_fill_it() -> None:
    with pytest.raises(UnavailableError) as caught:
        choose_worker([], CARD, Span(0, 6), ())
    assert caught.value.at == "worker"
    assert "no worker is attached" in caught.value.what
    assert "trunkline worker --broker URL --model tiny" in caught.value.hint


def test_other_blocks_are_a_mismatch_that_names_the_blocks() -> None:
    with pytest.raises(MismatchError) as caught:
        choose_worker([worker("a", 0, 3), worker("b", 3, 6)], CARD, Span(2, 5), ())
    assert caught.value.at == "worker"
    assert "blocks 2:5 are needed, the workers host 0:3, 3:6" in caught.value.what
    assert "--blocks" in caught.value.hint


@pytest.mark.parametrize(
    ("card", "why"),
    [
        (ModelCard(name="big", fingerprint="g", blocks=6, hidden=4), "architectures or tensors differ"),
        (
            ModelCard(name="tuned", fingerprint="f", blocks=6, hidden=4, samples={2: "aa", 3: "zz"}),
            "weights differ, first in block 3",
        ),
    ],
)
def test_another_model_is_a_mismatch_that_says_why(card: ModelCard, why: str) -> None:
    with pytest.raises(MismatchError) as caught:
        choose_worker([worker("a", model=card)], CARD, Span(2, 5), ())
    assert caught.value.at == "silo"
    assert "the silo holds tiny" in caught.value.what
    assert f"{card.name} (their {why})" in caught.value.what
    assert "--model" in caught.value.hint


def test_an_alias_does_not_give_the_identity_away() -> None:
    secret = bytes(range(16))
    assert alias_of(secret) == alias_of(secret)
    assert alias_of(secret) != alias_of(secret[::-1])
    assert not any(part in alias_of(secret) for part in (secret[:4], secret[4:8], secret[8:12]))


def test_a_silo_hosts_nothing_whatever_it_says() -> None:
    attach = Attach(role="silo", name="s", peer=bytes(16), model=CARD, start=0, stop=6)
    assert len(peer_from(b"r", attach, 0.0).blocks) == 0


def test_only_workers_that_read_what_will_be_sent_are_chosen() -> None:
    old, new = worker("old"), worker("new")
    old.encodings, old.load, new.load = frozenset({"raw", "planes"}), 0, 5
    new.encodings = frozenset(ENCODINGS)
    assert choose_worker([old, new], CARD, Span(0, 6), ("raw",)) is old
    assert choose_worker([old, new], CARD, Span(0, 6), ("raw", "steps")) is new
    with pytest.raises(MismatchError, match="reads all of raw, blocks") as caught:
        choose_worker([old], CARD, Span(0, 6), ("raw", "blocks"))
    assert (caught.value.at, "--wire" in caught.value.hint) == ("worker", True)


def test_what_a_pool_reads_is_what_all_of_it_reads() -> None:
    old, new = worker("old"), worker("new")
    old.encodings, new.encodings = frozenset({"raw", "steps"}), frozenset(ENCODINGS)
    assert common_encodings([]) == ENCODINGS == common_encodings([new])
    assert common_encodings([new, old]) == ("raw", "steps")


def test_a_peer_reads_what_it_says_and_the_plain_encodings_at_least() -> None:
    attach = Attach(role="silo", name="s", peer=bytes(16), encodings=("raw", "planes"))
    assert peer_from(b"r", attach, 0.0).encodings == {"raw", "planes"}
    for few in ((), ("raw",), ("steps", "blocks")):
        with pytest.raises(MismatchError, match="every peer must read raw and planes"):
            peer_from(b"r", Attach(role="silo", name="s", peer=bytes(16), encodings=few), 0.0)
