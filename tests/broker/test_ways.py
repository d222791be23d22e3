"""A worker of several brokers: no answer goes astray, no end of a silo is taken for another's."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from broker.parcel import Parcel
from broker.ways import Ways
from codec.messages import Done, Error, Extend, Gone, OpenSession
from codec.plan import ModelCard

CARD = ModelCard(name="m", fingerprint="f", blocks=6, hidden=4)
NORTH, SOUTH = b"north...", b"south..."
links, silos = st.integers(0, 2), st.sampled_from([NORTH, SOUTH])


def opens(silo: bytes, number: int) -> Parcel:
    header = OpenSession(id=number, session="s", model=CARD, start=0, stop=6, rows=1, capacity=8)
    return Parcel.of(header, peer=silo)


def extends(silo: bytes, number: int) -> Parcel:
    return Parcel.of(Extend(id=number, session="s", rows=(0,), starts=(0,), lengths=(1,)), peer=silo)


def gone(silo: bytes) -> Parcel:
    return Parcel.of(Gone(name="x"), peer=silo)


class Worker(RuleBasedStateMachine):
    """Three brokers say anything in any order; the worker answers what it was told when it likes.

    The reference: what each silo has here belongs to the broker that it was opened through last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ways = Ways()
        self.numbers = 0
        self.owner: dict[bytes, int] = {}
        self.open: dict[bytes, int] = {}
        """Sessions as the worker sees them: by silo, the broker through which they were opened."""
        self.unanswered: list[tuple[int, Parcel]] = []

    @rule(link=links, silo=silos, opening=st.booleans())
    def asks(self, link: int, silo: bytes, opening: bool) -> None:
        self.numbers += 1
        parcel = (opens if opening else extends)(silo, self.numbers)
        came = self.ways.came(link, parcel)
        stale = not opening and self.owner.get(silo, link) != link
        if stale:
            assert came.told == ()
            assert came.answered is not None
            assert isinstance(came.answered.header, Error)
            assert (came.answered.header.id, came.answered.peer) == (self.numbers, silo)
            return
        assert came.answered is None
        *before, told = came.told
        assert told is parcel
        moved = self.owner.get(silo, link) != link
        assert [(type(each.header), each.peer) for each in before] == [(Gone, silo)] * moved
        self.owner[silo] = link
        if moved:
            self.open.pop(silo, None)
        if opening:
            self.open[silo] = link
        self.unanswered.append((link, parcel))

    @rule(data=st.data())
    def answers(self, data: st.DataObject) -> None:
        if self.unanswered:
            link, parcel = self.unanswered.pop(data.draw(st.integers(0, len(self.unanswered) - 1)))
            answer = Parcel.of(Done(id=parcel.header.id), peer=parcel.peer)
            assert self.ways.back(answer) == link
            assert self.ways.back(answer) is None, "once"

    @rule(link=links, silo=silos)
    def says_gone(self, link: int, silo: bytes) -> None:
        came = self.ways.came(link, gone(silo))
        mine = self.owner.get(silo, link) == link
        assert [each.peer for each in came.told] == [silo] * mine
        if mine:
            self.owner.pop(silo, None)
            self.open.pop(silo, None)

    @rule(link=links, restarted=st.booleans())
    def is_lost(self, link: int, restarted: bool) -> None:
        told = self.ways.came(link, gone(b"")).told if restarted else tuple(self.ways.lost(link))
        theirs = [silo for silo, owner in self.owner.items() if owner == link]
        assert all(isinstance(each.header, Gone) for each in told)
        assert sorted(each.peer for each in told) == sorted(theirs)
        for silo in theirs:
            del self.owner[silo]
            self.open.pop(silo, None)
        assert link not in self.open.values(), "nothing of a lost broker's is left"


TestWorker = Worker.TestCase
TestWorker.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_a_silo_that_moved_is_not_ended_by_the_broker_it_left() -> None:
    ways = Ways()
    ways.came(0, opens(NORTH, 1))
    moved = ways.came(1, opens(NORTH, 2))
    assert [type(each.header) for each in moved.told] == [Gone, OpenSession]
    assert ways.came(0, gone(NORTH)).told == ()
    assert ways.came(0, gone(b"")).told == ()
    assert len(ways.came(1, gone(NORTH)).told) == 1


def test_silos_without_number_do_not_fill_the_memory() -> None:
    ways = Ways()
    for number in range(1 << 17):
        silo = number.to_bytes(8, "big")
        ways.came(number % 2, opens(silo, 1))
        ways.back(Parcel.of(Done(id=1), peer=silo))
    assert len(ways._home) == 1 << 16
    assert not ways._asked
