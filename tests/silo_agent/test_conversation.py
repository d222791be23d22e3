"""Turns that share a session: what is cached is not sent again, and nothing is forgotten."""

from typing import Any

import pytest

from codec.errors import LimitError
from codec.messages import Extend
from silo_agent.conversation import Conversation
from silo_agent.data import prompt_ids
from silo_agent.generation import generate
from silo_agent.noise import Noise, NoiseScale
from silo_agent.sampling import Sampling

ENDS = frozenset({2})
GREEDY = Sampling()


def fresh_answer(pool: Any, tiny: Any, messages: list[dict[str, str]], tokens: int) -> str:
    """What a session that never heard of the conversation answers to all of it."""
    with pool.session(capacity=600) as session:
        prompt = prompt_ids(tiny.tokenizer, messages, answer_next=True)
        (answer,) = generate(session, tiny.tokenizer, [prompt], max_tokens=tokens, ends=ENDS)
    return answer.text


def test_later_turns_answer_as_a_fresh_session_and_send_only_what_is_new(pool: Any, tiny: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}]
    remote = pool.remote()
    with pool.session(capacity=600, remote=remote) as session:
        talk = Conversation(session, tiny.tokenizer, ENDS, GREEDY, "Be brief.")
        known = 0
        for question in ("Who is the patient?", "And when will he be looked at again?", "Why?"):
            messages.append({"role": "user", "content": question})
            prompt = prompt_ids(tiny.tokenizer, messages, answer_next=True)
            pool.broker.passed.clear()
            before = remote.traffic.tokens.get("extend up", 0)
            answer = talk.say(question, 14, lambda _: None)
            first, *steps = [parcel.header for parcel in pool.sent(Extend)]
            assert isinstance(first, Extend)
            # The turns before are cached; only an answer whose text has other tokens is sent anew.
            assert first.starts[0] >= known
            assert first.starts[0] + first.lengths[0] == len(prompt)
            assert all(step.lengths == (1,) for step in steps)
            crossed = remote.traffic.tokens["extend up"] - before
            assert crossed == len(prompt) - first.starts[0] + len(steps)
            assert answer == fresh_answer(pool, tiny, messages, 14)
            assert answer, "an empty answer shows nothing"
            known = len(prompt)
            messages.append({"role": "assistant", "content": answer})


def test_pieces_add_up_to_the_answer(pool: Any, tiny: Any) -> None:
    pieces: list[str] = []
    with pool.session(capacity=200) as session:
        talk = Conversation(session, tiny.tokenizer, ENDS, GREEDY)
        assert talk.say("Who is it?", 10, pieces.append) == "".join(pieces)


def test_the_same_turn_again_still_runs_its_last_token(pool: Any, tiny: Any) -> None:
    """All of the prompt is cached then; without its last token nothing would be predicted."""
    with pool.session(capacity=200) as session:
        Conversation(session, tiny.tokenizer, ENDS, GREEDY).say("Who is it?", 1, lambda _: None)
        talk = Conversation(session, tiny.tokenizer, ENDS, GREEDY)
        talk._cached = prompt_ids(
            tiny.tokenizer, [{"role": "user", "content": "Who is it?"}], answer_next=True
        )
        answer = talk.say("Who is it?", 8, lambda _: None)
    assert answer == fresh_answer(pool, tiny, [{"role": "user", "content": "Who is it?"}], 8)


def test_a_turn_that_does_not_fit_is_as_if_it_was_never_said(pool: Any, tiny: Any) -> None:
    with pool.session(capacity=90) as session:
        talk = Conversation(session, tiny.tokenizer, ENDS, GREEDY)
        first = talk.say("Who is it?", 6, lambda _: None)
        with pytest.raises(LimitError, match="do not fit a session row of 90"):
            talk.say("word " * 60, 6, lambda _: None)
        with pytest.raises(LimitError, match="do not fit a session row of 90"):
            talk.say("And why?", 80, lambda _: None)  # This one fails half-way through its answer.
        again = talk.say("And when?", 6, lambda _: None)
    messages = [
        {"role": "user", "content": "Who is it?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And when?"},
    ]
    assert again == fresh_answer(pool, tiny, messages, 6)


def test_with_noise_the_cached_turns_are_not_noised_again(pool: Any, tiny: Any) -> None:
    """A second copy of the same states under other noise would let the server average."""
    noise = Noise(NoiseScale(relative=0.05))
    with pool.session(capacity=300, noise=noise) as session:
        talk = Conversation(session, tiny.tokenizer, ENDS, GREEDY)
        talk.say("Who is the patient?", 10, lambda _: None)
        first = len(
            prompt_ids(tiny.tokenizer, [{"role": "user", "content": "Who is the patient?"}], answer_next=True)
        )
        pool.broker.passed.clear()
        talk.say("Why?", 10, lambda _: None)
        assert min(parcel.header.starts[0] for parcel in pool.sent(Extend)) >= first
