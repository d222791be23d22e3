"""Sessions whose worker leaves, stops or forgets them: the text is the undisturbed one's."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from broker.parcel import Parcel, error_parcel
from codec.errors import LimitError, MismatchError, TrunklineError, UnavailableError
from codec.messages import CloseSession, Extend, OpenSession
from silo_agent.conversation import Conversation
from silo_agent.generation import generate
from silo_agent.noise import Noise, NoiseScale
from silo_agent.sampling import Sampling

PROMPTS = ["The patient was seen in the clinic", "Chest pain"]
TOKENS = 8


def frames(parcels: Sequence[Parcel]) -> list[tuple[bytes, ...]]:
    return [tuple(bytes(frame) for frame in parcel.tensors) for parcel in parcels]


def answers(pool: Any, tiny: Any, **options: Any) -> list[list[int]]:
    with pool.session(rows=len(PROMPTS), **options) as session:
        prompts = [tiny.ids(prompt) for prompt in PROMPTS]
        made = generate(session, tiny.tokenizer, prompts, max_tokens=TOKENS, ends=frozenset())
    return [answer.tokens for answer in made]


@pytest.mark.parametrize("extends", [0, 1, 4], ids=["in the prompt's pass", "in the first step", "later"])
def test_a_worker_leaves_with_a_request_in_its_hands(bare_pool: Any, tiny: Any, extends: int) -> None:
    bare_pool.start_mortal_worker(extends)
    bare_pool.start_worker()
    assert answers(bare_pool, tiny) == [tiny.greedy(tiny.ids(prompt), TOKENS) for prompt in PROMPTS]
    assert len(bare_pool.sent(OpenSession)) == 2
    # The one in its hands went to both, and so did what had been answered.
    assert len(bare_pool.sent(Extend)) == (extends + 1) + TOKENS


def test_rows_that_were_taken_anew_by_other_prompts(bare_pool: Any, tiny: Any) -> None:
    """What their earlier prompts sent is not sent again."""
    bare_pool.start_mortal_worker(14)
    bare_pool.start_worker()
    prompts = [tiny.ids(prompt) for prompt in (*PROMPTS, "And a third", "hello")]
    with bare_pool.session(rows=2) as session:
        made = generate(session, tiny.tokenizer, prompts, max_tokens=TOKENS, ends=frozenset())
    assert [answer.tokens for answer in made] == [tiny.greedy(prompt, TOKENS) for prompt in prompts]
    assert len(bare_pool.sent(Extend)) == 15 + (15 - TOKENS) + 1


def test_the_same_noisy_bytes_are_sent_again(bare_pool: Any, tiny: Any) -> None:
    bare_pool.start_mortal_worker(4)
    bare_pool.start_worker()
    answers(bare_pool, tiny, noise=Noise(NoiseScale(relative=0.1)))
    sent = bare_pool.sent(Extend)
    first, again = frames(sent[:5]), frames(sent[5:])
    assert again[:5] == first
    assert len(set(again)) == len(again), "each was noised anew, once"
    for before, after in zip(sent[:5], sent[5:], strict=False):
        facts = [
            (p.header.rows, p.header.starts, p.header.lengths, p.header.tensors) for p in (before, after)
        ]
        assert facts[0] == facts[1]


def test_a_worker_leaves_between_two_requests_and_another_comes_later(bare_pool: Any, tiny: Any) -> None:
    ids = tiny.ids(PROMPTS[0])
    bare_pool.start_worker()
    with bare_pool.session(rows=2) as session:
        session.extend([0, 1], [ids[:3], ids])
        bare_pool.lose_workers()
        bare_pool.start_worker()
        logits = session.extend([0], [ids[3:]])
        bare_pool.lose_workers()
        bare_pool.start_worker()
        both = session.extend([1, 0], [ids[-1:], ids[3:]], starts=[len(ids) - 1, 3])
    for found in (logits[0], both[0], both[1]):
        torch.testing.assert_close(found, tiny.logits(ids)[-1], atol=2e-5, rtol=0)


def test_a_worker_that_forgot_the_session(pool: Any, tiny: Any) -> None:
    """As after an eviction: the name is not known any more."""
    ids, remote = tiny.ids(PROMPTS[0]), pool.remote()
    with pool.session(remote=remote) as session:
        session.extend([0], [ids[:4]])
        remote.call(CloseSession(session=session._name))
        logits = session.extend([0], [ids[4:]])
    torch.testing.assert_close(logits[0], tiny.logits(ids)[-1], atol=2e-5, rtol=0)


def test_a_request_that_a_worker_never_answers(bare_pool: Any, tiny: Any) -> None:
    """The worker is still attached; that something is wrong is noticed by the deadline."""
    ids, seen = tiny.ids(PROMPTS[0]), itertools.count(1)

    def swallow(parcel: Parcel) -> list[Parcel] | None:
        return [] if isinstance(parcel.header, Extend) and next(seen) == 2 else None

    bare_pool.start_moody_worker(swallow)
    remote = bare_pool.remote()
    with bare_pool.session(remote=remote) as session:
        session.extend([0], [ids[:4]])
        remote._deadline = 1.0
        logits = session.extend([0], [ids[4:]])
    torch.testing.assert_close(logits[0], tiny.logits(ids)[-1], atol=2e-5, rtol=0)


def test_a_chat_goes_on_with_what_it_rolled_back(new_pool: Any, tiny: Any) -> None:
    said: list[list[str]] = []
    for lost in (False, True):
        with new_pool() as pool:
            pool.start_worker()
            with pool.session(capacity=400) as session:
                talk = Conversation(session, tiny.tokenizer, frozenset(), Sampling())
                turns = []
                for turn in ("Hello there", "And then?", "Why?"):
                    turns.append(talk.say(turn, 6, lambda _: None))
                    if lost:
                        pool.lose_workers()
                        pool.start_worker()
                said.append(turns)
    assert said[0] == said[1]


def test_without_another_worker_it_ends_in_time_and_can_go_on_later(bare_pool: Any, tiny: Any) -> None:
    ids = tiny.ids(PROMPTS[0])
    bare_pool.start_mortal_worker(1)
    with bare_pool.session(wait=0.8) as session:
        session.extend([0], [ids[:4]])
        begun = time.monotonic()
        with pytest.raises(UnavailableError, match="left before it answered; the session could not be moved"):
            session.extend([0], [ids[4:]])
        assert time.monotonic() - begun < 5
        bare_pool.start_worker()
        logits = session.extend([0], [ids[4:]])
    torch.testing.assert_close(logits[0], tiny.logits(ids)[-1], atol=2e-5, rtol=0)


def test_a_session_that_kills_its_workers_gives_up(bare_pool: Any, tiny: Any) -> None:
    for _ in range(6):
        bare_pool.start_mortal_worker(0)
    with bare_pool.session() as session, pytest.raises(UnavailableError, match="could not be moved"):
        session.extend([0], [tiny.ids(PROMPTS[0])])
    assert len(bare_pool.sent(Extend)) == 1 + 3


def test_a_broker_may_be_restarted_as_often_as_time_allows(bare_pool: Any, tiny: Any) -> None:
    """That says nothing about the session, as a worker's death does."""
    ids, restarts = tiny.ids(PROMPTS[0]), 7
    lost = UnavailableError("the broker was restarted: the answer is lost", side="broker")

    def refuse(parcel: Parcel) -> list[Parcel] | None:
        nonlocal restarts
        if not isinstance(parcel.header, Extend) or not restarts:
            return None
        restarts -= 1
        return [error_parcel(parcel.header.id, lost).to(parcel.peer)]

    bare_pool.start_moody_worker(refuse)
    with bare_pool.session() as session:
        logits = session.extend([0], [ids])
        torch.testing.assert_close(logits[0], tiny.logits(ids)[-1], atol=2e-5, rtol=0)
        restarts = 1 << 30
    with bare_pool.session(wait=0.8) as session:
        begun = time.monotonic()
        with pytest.raises(UnavailableError, match="could not be moved"):
            session.extend([0], [ids])
        assert 0.7 < time.monotonic() - begun < 5


@pytest.mark.parametrize("error", [LimitError("no KV cache is free"), MismatchError("it hosts 0:1")])
def test_a_worker_that_cannot_yet_is_waited_for_but_not_for_ever(
    bare_pool: Any, tiny: Any, error: TrunklineError
) -> None:
    """It is full, or the one that hosts these blocks is not back."""
    ids, full = tiny.ids(PROMPTS[0]), 6

    def refuse(parcel: Parcel) -> list[Parcel] | None:
        nonlocal full
        if not isinstance(parcel.header, OpenSession) or not full:
            return None
        full -= 1
        return [error_parcel(parcel.header.id, error).to(parcel.peer)]

    bare_pool.start_mortal_worker(1)
    bare_pool.start_moody_worker(refuse)
    with bare_pool.session(wait=1.2) as session:
        session.extend([0], [ids[:4]])
        with pytest.raises(type(error), match=f"could not be moved: {error.what}"):
            session.extend([0], [ids[4:]])
        assert 2 <= len(bare_pool.sent(OpenSession)) <= 6
        full = 2
        logits = session.extend([0], [ids[4:]])
    torch.testing.assert_close(logits[0], tiny.logits(ids)[-1], atol=2e-5, rtol=0)
