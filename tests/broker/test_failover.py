"""Which broker a link uses next: any interleaving of welcomes, losses, refusals and time."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker.failover import Connect, Failover
from codec.errors import LinkError, RefusedError, TrunklineError

ENDPOINTS = ["tcp://127.0.0.1:1", "tcp://127.0.0.1:2", "tcp://127.0.0.1:3"]
PATIENCE = 20.0
STEP = 0.1


class Brokers(RuleBasedStateMachine):
    """Time passes in steps of the link's loop, and the world does what it likes in between."""

    @initialize(count=st.integers(1, 3))
    def start(self, count: int) -> None:
        self.now = 100.0
        self.endpoints = ENDPOINTS[:count]
        self.failover = Failover(self.endpoints, PATIENCE, self.now)
        self.using = self.endpoints[0]
        self.serving = False
        self.lost_at = self.tried_at = self.now
        self.tries = {self.using: self.now}
        self.refused: set[str] = set()
        self.ended: TrunklineError | None = None

    @rule()
    def welcomed(self) -> None:
        self.failover.welcomed()
        self.serving, self.refused = True, set()

    @rule(refusal=st.booleans())
    def is_of_no_use(self, refusal: bool) -> None:
        self._lose()
        error = RefusedError("not allowed") if refusal else None
        self.failover.useless(self.now, error)
        if refusal:
            self.refused.add(self.using)
        self.tried_at = min(self.tried_at, self.now - Failover.TRY)

    @rule()
    def lost(self) -> None:
        self._lose()
        self.failover.lost(self.now)

    def _lose(self) -> None:
        if self.serving:
            self.serving, self.lost_at, self.tried_at = False, self.now, self.now

    @rule()
    def has_nobody(self) -> None:
        left = self.failover.unserved(self.now)
        young = self.now - self.tries[self.using] < Failover.TRY
        assert left == (len(self.endpoints) > 1 and not young)
        if left:
            self._lose()
            self.tried_at = min(self.tried_at, self.now - Failover.TRY)

    @rule(steps=st.integers(1, 50))
    def time_passes(self, steps: int) -> None:
        for _ in range(steps):
            if self.ended is None:
                self.now += STEP
                self._tick()

    def _tick(self) -> None:
        due = self.failover.tick(self.now)
        waited = self.now - self.lost_at
        if self.serving:
            assert due is None, "who is served stays"
        elif isinstance(due, TrunklineError):
            assert waited > PATIENCE or self.refused == set(self.endpoints)
            assert isinstance(due, RefusedError) == (self.refused == set(self.endpoints))
            self.ended = due
        elif isinstance(due, Connect):
            following = self.endpoints[(self.endpoints.index(self.using) + 1) % len(self.endpoints)]
            assert due.endpoint == following != self.using
            assert self.now - self.tries.get(following, 0.0) >= Failover.RETRY - 1e-9, "none is hammered"
            assert self.now - self.tried_at >= Failover.TRY - 1e-9, "each has its time"
            self.using, self.tried_at = following, self.now
            self.tries[following] = self.now
        else:
            assert waited <= PATIENCE
            if len(self.endpoints) > 1:
                longest = max(Failover.TRY, Failover.RETRY) + STEP
                assert self.now - max(self.tried_at, self.lost_at - Failover.TRY) <= longest + 1e-6

    @invariant()
    def one_at_a_time(self) -> None:
        assert self.failover.endpoint == self.using


TestBrokers = Brokers.TestCase
TestBrokers.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)


def test_all_are_tried_in_order_round_and_round_until_patience_ends() -> None:
    failover = Failover(ENDPOINTS, 20.0, 0.0)
    seen, now = [failover.endpoint], 0.0
    while not isinstance(due := failover.tick(now), TrunklineError):
        if due is not None:
            seen.append(due.endpoint)
        now += 0.1
    assert seen == [ENDPOINTS[i % 3] for i in range(len(seen))]
    assert len(seen) == 10, "two seconds each"
    assert isinstance(due, LinkError)
    assert all(endpoint in due.what for endpoint in ENDPOINTS)
    assert 20.0 < now < 20.2


def test_where_nobody_listens_the_next_is_tried_at_once() -> None:
    failover = Failover(ENDPOINTS[:2], 20.0, 0.0)
    failover.useless(0.01)
    assert failover.tick(0.01) == Connect(ENDPOINTS[1])
    failover.useless(0.02)
    assert failover.tick(0.02) is None, "the first was tried a moment ago"
    assert failover.tick(0.5) == Connect(ENDPOINTS[0])


def test_a_broker_that_blinks_is_gone_back_to() -> None:
    failover = Failover(ENDPOINTS[:2], 20.0, 0.0)
    failover.welcomed()
    failover.lost(5.0)
    assert failover.tick(6.9) is None
    failover.welcomed()
    assert failover.tick(60.0) is None
    assert failover.endpoint == ENDPOINTS[0]


def test_refused_everywhere_is_the_end_and_refused_somewhere_is_not() -> None:
    failover = Failover(ENDPOINTS[:2], 20.0, 0.0)
    failover.useless(0.0, RefusedError("not allowed"))
    assert failover.tick(0.0) == Connect(ENDPOINTS[1])
    failover.useless(0.1, RefusedError("not allowed either"))
    assert isinstance(failover.tick(0.1), RefusedError)
