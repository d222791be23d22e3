"""What goes to a worker, and when: bounds that hold for every history, not this queue's own words."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker.ask import Ask, Rank, cost
from broker.inbox import Inbox
from codec.messages import (
    Backward,
    CloseSession,
    Commit,
    Extend,
    Forward,
    GetAdapter,
    OpenSession,
    Request,
    TensorSpec,
)
from codec.plan import ModelCard

PATIENCE = 4
"""Credits that may go to others while a class waits."""


class Desk:
    """An inbox and a worker that answers when it is told to."""

    def __init__(self, credit: int) -> None:
        self.inbox: Inbox[Ask] = Inbox()
        self.inbox.grant(credit)
        self.at_worker: list[Ask] = []
        self.numbers = count(1)

    def asks(self, silo: str, rank: Rank, tokens: int, name: str = "") -> list[Ask]:
        """A new request, of a flow of its own where no name is given; what goes."""
        number = next(self.numbers)
        ask = Ask((silo.encode(), "session", name or f"s{number}"), number, rank, tokens)
        return self.goes([ask] if self.inbox.passes(ask) else self.inbox.queue(ask))

    def answers(self, index: int = 0) -> list[Ask]:
        ask = self.at_worker.pop(index)
        assert self.inbox.answered(ask.flow[0], ask.number) is ask
        return self.goes(self.inbox.release())

    def goes(self, asks: Iterable[Ask]) -> list[Ask]:
        going = list(asks)
        self.at_worker += going
        return going


def test_it_goes_at_once_until_the_credit_is_used_up_and_again_when_answers_come() -> None:
    desk = Desk(credit=10)
    assert len(desk.asks("a", Rank.FORWARD, 6)) == len(desk.asks("a", Rank.FORWARD, 4)) == 1
    assert desk.asks("a", Rank.FORWARD, 4) == desk.asks("a", Rank.FORWARD, 3) == []
    assert (desk.inbox.waiting, desk.inbox.tokens_waiting, desk.inbox.tokens_under_way) == (2, 7, 10)
    assert [ask.tokens for ask in desk.answers()] == [4]
    assert [ask.tokens for ask in desk.answers()] == [3]
    assert (desk.inbox.waiting, desk.inbox.tokens_waiting, desk.inbox.tokens_under_way) == (0, 0, 7)


def test_what_is_larger_than_the_credit_goes_alone() -> None:
    desk = Desk(credit=10)
    desk.asks("a", Rank.FORWARD, 1)
    assert desk.asks("a", Rank.FORWARD, 25) == []
    assert desk.asks("b", Rank.FORWARD, 1) == [], "and it is not overtaken by what would fit"
    assert [ask.tokens for ask in desk.answers()] == [25]
    assert [ask.tokens for ask in desk.answers()] == [1]


def test_without_a_bound_nothing_waits() -> None:
    desk = Desk(credit=0)
    assert all(desk.asks("a", Rank.FORWARD, 1 << 40) for _ in range(100))


def test_classes_go_in_order() -> None:
    desk = Desk(credit=10)
    desk.asks("a", Rank.FORWARD, 10)
    for rank in (Rank.FORWARD, Rank.PREFILL, Rank.DECODE, Rank.BACKWARD):
        assert desk.asks("a", rank, 10) == []
    assert [desk.answers()[0].rank for _ in range(4)] == list(Rank)


def test_the_first_of_a_flow_decides_its_class_and_none_overtakes_it() -> None:
    desk = Desk(credit=1)
    desk.asks("a", Rank.DECODE, 1)
    for rank, name in ((Rank.FORWARD, "run"), (Rank.BACKWARD, "run"), (Rank.PREFILL, "other")):
        desk.asks("a", rank, 1, name)
    assert [desk.answers()[0].rank for _ in range(3)] == [Rank.PREFILL, Rank.FORWARD, Rank.BACKWARD]


def test_what_costs_nothing_waits_for_its_flow_alone() -> None:
    desk = Desk(credit=1)
    desk.asks("a", Rank.FORWARD, 7, "run")
    assert len(desk.asks("a", Rank.DECODE, 0, "run")) == 1, "the one before it has gone"
    assert desk.asks("a", Rank.FORWARD, 7, "run") == []
    assert desk.asks("a", Rank.DECODE, 0, "run") == desk.asks("a", Rank.DECODE, 0, "run") == []
    assert len(desk.asks("a", Rank.DECODE, 0, "other")) == 1
    desk.asks("a", Rank.FORWARD, 5, "run")
    assert [ask.tokens for ask in desk.answers()] == [7, 0, 0]


def test_a_worker_on_a_new_connection_has_all_its_credit() -> None:
    desk = Desk(credit=5)
    desk.asks("a", Rank.FORWARD, 5)
    desk.asks("a", Rank.FORWARD, 5)
    desk.inbox.renew()
    assert len(desk.goes(desk.inbox.release())) == 1
    desk.answers(0)  # One of before: it was not lost after all.
    assert desk.inbox.tokens_under_way == 5
    desk.answers(0)
    assert desk.inbox.tokens_under_way == 0


def test_what_is_withdrawn_does_not_stand_in_the_way() -> None:
    desk = Desk(credit=10)
    desk.asks("a", Rank.FORWARD, 8)
    desk.asks("heavy", Rank.FORWARD, 90)
    desk.asks("heavy", Rank.FORWARD, 90, "other")
    desk.asks("b", Rank.FORWARD, 2)
    assert len(desk.inbox.withdraw(b"heavy", (b"heavy", "session", "other"))) == 1
    assert desk.inbox.release() == []
    assert [ask.tokens for ask in desk.inbox.withdraw(b"heavy")] == [90]
    assert [ask.tokens for ask in desk.inbox.release()] == [2]
    assert desk.inbox.waiting == desk.inbox.tokens_waiting == 0


def test_unknown_answers_give_no_credit() -> None:
    desk = Desk(credit=10)
    desk.asks("a", Rank.FORWARD, 10)
    desk.asks("a", Rank.FORWARD, 10)
    waits = 2
    for silo, number in ((b"b", 1), (b"a", waits), (b"a", 9)):
        assert desk.inbox.answered(silo, number) is None
    assert desk.inbox.tokens_under_way == 10


tokens = st.integers(1, 20)


@given(
    credit=st.integers(1, 40),
    sizes=st.dictionaries(st.sampled_from("abcd"), st.lists(tokens, min_size=1), min_size=2),
    sessions=st.integers(1, 3),
)
def test_silos_that_wait_in_one_class_get_the_same_tokens(
    credit: int, sizes: dict[str, list[int]], sessions: int
) -> None:
    """The first has three times as much waiting as the others, and gets no more for it."""
    desk = Desk(credit)
    left = dict.fromkeys(sizes, 200)
    given_to: Counter[str] = Counter()

    def keep_waiting() -> None:
        """Enough that nobody runs out while several go at once."""
        waits: Counter[bytes] = Counter()
        for ask in desk.inbox:
            waits[ask.flow[0]] += 0 if ask in desk.at_worker else ask.tokens
        for n, (silo, own) in enumerate(sizes.items()):
            while left[silo] and waits[silo.encode()] <= (180 if n == 0 else 60):
                size = own[left[silo] % len(own)]
                for ask in desk.asks(silo, Rank.FORWARD, size, f"s{left[silo] % sessions}"):
                    given_to[ask.flow[0].decode()] += ask.tokens
                left[silo] -= 1
                waits[silo.encode()] += size

    keep_waiting()
    before = given_to.copy()  # Those who came while nothing waited went at once.
    assert sum(before.values()) <= max(credit, 20)
    while all(left.values()):
        for ask in desk.answers():
            given_to[ask.flow[0].decode()] += ask.tokens
            had = [given_to[silo] - before[silo] for silo in sizes]
            assert max(had) - min(had) <= 2 * 20
        keep_waiting()


def test_who_comes_late_does_not_make_up_for_it() -> None:
    desk = Desk(credit=10)
    for _ in range(60):
        desk.asks("early", Rank.FORWARD, 10)
    for _ in range(40):
        desk.answers()
    for _ in range(10):
        desk.asks("late", Rank.FORWARD, 10)
    turns = [desk.answers()[0].flow[0] for _ in range(12)]
    assert turns.count(b"early") == turns.count(b"late") == 6


@given(
    credit=st.integers(1, 40),
    waiting=st.sampled_from(list(Rank)),
    others=st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(list(Rank)), tokens), min_size=1),
)
def test_no_class_starves(credit: int, waiting: Rank, others: list[tuple[str, Rank, int]]) -> None:
    """However much of the other classes comes, one request waits for a bounded number of tokens."""
    desk = Desk(credit)
    desk.asks("a", Rank.DECODE, credit)
    assert desk.asks("patient", waiting, 1) == []
    passed = 0
    for silo, rank, size in others * 200:
        new = 0 if rank is waiting else 2
        going = [ask for _ in range(new) for ask in desk.asks(silo, rank, size)]
        for ask in [*going, *desk.answers()]:
            if ask.flow[0] == b"patient":
                return
            passed += ask.tokens
        assert passed <= PATIENCE * credit + 4 * 20
    assert not any(ask.flow[0] == b"patient" for ask in desk.inbox) or passed < PATIENCE * credit


class AnyHistory(RuleBasedStateMachine):
    """Requests, answers in any order, silos and flows that end, new connections, other credits."""

    @initialize(credit=st.integers(0, 12))
    def begin(self, credit: int) -> None:
        self.desk = Desk(credit)
        self.credit = credit or 1 << 62
        self.counted: dict[int, int] = {}
        """Tokens of requests under way that count, by number."""
        self.expected: dict[tuple[bytes, str, str], list[int]] = defaultdict(list)
        """Numbers that were asked and did not go yet, by flow."""

    @rule(
        silo=st.sampled_from("abc"),
        name=st.sampled_from("xy"),
        rank=st.sampled_from(list(Rank)),
        size=st.sampled_from([0, 1, 1, 3, 8, 20]),
    )
    def ask(self, silo: str, name: str, rank: Rank, size: int) -> None:
        number = next(self.desk.numbers)
        self.desk.numbers = count(number)
        self.expected[silo.encode(), "session", name].append(number)
        self.went(self.desk.asks(silo, rank, size, name))

    @rule(choice=st.integers(0, 9))
    def answer(self, choice: int) -> None:
        if self.desk.at_worker:
            index = choice % len(self.desk.at_worker)
            self.counted.pop(self.desk.at_worker[index].number)
            self.went(self.desk.answers(index))

    @rule(silo=st.sampled_from("abc"), name=st.sampled_from(["x", "y", None]))
    def withdraw(self, silo: str, name: str | None) -> None:
        flow = (silo.encode(), "session", name) if name else None
        gone = self.desk.inbox.withdraw(silo.encode(), flow)
        for key in [key for key in self.expected if key[0] == silo.encode() and flow in (None, key)]:
            numbers = self.expected.pop(key)
            assert [ask.number for ask in gone if ask.flow == key] == numbers
        self.went(self.desk.goes(self.desk.inbox.release()))

    @rule()
    def renew(self) -> None:
        self.desk.inbox.renew()
        self.counted = dict.fromkeys(self.counted, 0)
        self.went(self.desk.goes(self.desk.inbox.release()))

    @rule(credit=st.integers(0, 12))
    def grant(self, credit: int) -> None:
        self.credit = credit or 1 << 62
        self.desk.inbox.grant(credit)
        self.went(self.desk.goes(self.desk.inbox.release()))

    @invariant()
    def the_figures_are_right_and_somebody_works_if_somebody_waits(self) -> None:
        inbox = self.desk.inbox
        assert inbox.tokens_under_way == sum(self.counted.values())
        assert inbox.waiting == sum(map(len, self.expected.values()))
        assert {ask.number for ask in inbox} == {
            *self.counted,
            *(number for numbers in self.expected.values() for number in numbers),
        }
        assert inbox.tokens_under_way or not inbox.waiting

    def teardown(self) -> None:
        if hasattr(self, "desk"):
            while self.desk.at_worker:
                self.answer(0)
            assert (self.desk.inbox.tokens_under_way, self.desk.inbox.waiting) == (0, 0)
            assert self.desk.inbox.tokens_waiting == 0
            assert not any(self.expected.values())

    def went(self, asks: list[Ask]) -> None:
        for ask in asks:
            assert self.expected[ask.flow].pop(0) == ask.number, "reordered, or twice"
            before = sum(self.counted.values())
            self.counted[ask.number] = ask.tokens
            assert not ask.tokens or not before or before + ask.tokens <= self.credit


TestAnyHistory = AnyHistory.TestCase

SPEC = TensorSpec("f32", (7, 4), "raw", (112,))
CARD = ModelCard(name="m", fingerprint="f", blocks=6, hidden=4)
ROWS = {"session": "s", "rows": (0, 1), "starts": (0, 0)}


@pytest.mark.parametrize(
    ("header", "rank", "tokens"),
    [
        (Extend(id=1, lengths=(1, 1), **ROWS), Rank.DECODE, 2),
        (Extend(id=1, lengths=(1, 2), **ROWS), Rank.PREFILL, 3),
        (Forward(id=1, run="r", microbatch=0, lengths=(1, 1)), Rank.FORWARD, 2),
        (Backward(id=1, run="r", microbatch=0, tensors=(SPEC,)), Rank.BACKWARD, 7),
        (Backward(id=1, run="r", microbatch=0), Rank.BACKWARD, 0),
        (CloseSession(id=1, session="s"), Rank.DECODE, 0),
        (OpenSession(id=1, session="s", model=CARD, start=1, stop=2, rows=1, capacity=9), Rank.DECODE, 0),
        (Commit(id=1, run="r", step=0, loss_tokens=9, square_norm=0.0), Rank.DECODE, 0),
        (GetAdapter(id=1, run="r"), Rank.DECODE, 0),
    ],
)
def test_a_request_says_what_it_costs(header: Request, rank: Rank, tokens: int) -> None:
    assert cost(header) == (rank, tokens)
