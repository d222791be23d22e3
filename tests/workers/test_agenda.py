"""What runs next: everything that may share a pass, nothing before its time, and nobody for ever later."""

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from workers.agenda import _TURNS, MAX_PASS_TOKENS, Agenda, Job, Pass

CHUNK = 64
NORTH, SOUTH, EAST = SILOS = (b"north", b"south", b"east")


def decode(silo: bytes, session: int = 0, rows: int = 1) -> Job:
    return Job(silo, "decode", (silo, session), (silo, session), rows)


def prefill(silo: bytes, tokens: int, session: int = 0, whole: bool = False) -> Job:
    return Job(silo, "prefill", (silo, session), (silo, session), tokens, whole)


def forward(silo: bytes, number: int, tokens: int = 100) -> Job:
    return Job(silo, "forward", (silo, "run"), (silo, "run", number), tokens)


def backward(silo: bytes, number: int, group: int | None = None, due: float = 0.0) -> Job:
    return Job(silo, "backward", (silo, "run"), (silo, "run", number), 100, group=group, due=due)


def alone(silo: bytes, flow: Any) -> Job:
    return Job(silo, "alone", (silo, flow))


def passes(agenda: Agenda, now: float = 0.0, members: dict[int, int] | None = None) -> list[Pass]:
    found = []
    while (chosen := agenda.next_pass(now, CHUNK, members or {})) is not None:
        found.append(chosen)
    return found


def jobs(chosen: Pass) -> list[Job]:
    return [share.job for share in chosen.shares]


def planned(*waiting: Job) -> list[list[Job]]:
    agenda = Agenda()
    for job in waiting:
        agenda.add(job, 0.0)
    return [jobs(chosen) for chosen in passes(agenda)]


def test_decode_steps_share_a_pass_with_a_part_of_a_prompt() -> None:
    agenda = Agenda()
    steps = [decode(silo, session) for silo in SILOS for session in range(5)]
    prompt = prefill(NORTH, 200, session=9)
    for job in [prompt, *steps]:
        agenda.add(job, 0.0)
    first = agenda.next_pass(0.0, CHUNK, {})
    assert first is not None
    assert jobs(first) == [*steps, prompt]
    assert first.shares[-1].tokens == CHUNK
    assert prompt.tokens == 200 - CHUNK
    # A step was decoded just now: the next one is not to wait for all of the prompt.
    second = agenda.next_pass(0.1, CHUNK, {})
    assert second is not None
    assert [share.tokens for share in second.shares] == [CHUNK]
    # Nobody has decoded for long: it may have it all.
    third = agenda.next_pass(9.0, CHUNK, {})
    assert third is not None
    assert [share.tokens for share in third.shares] == [200 - 2 * CHUNK]
    assert not agenda.waiting


def test_what_may_not_be_cut_runs_whole() -> None:
    long = prefill(NORTH, MAX_PASS_TOKENS + 1, whole=True)
    assert planned(long) == [[long]]
    masked, step = prefill(NORTH, CHUNK + 1, whole=True), decode(SOUTH)
    agenda = Agenda()
    agenda.add(masked, 0.0)
    agenda.add(step, 0.0)
    assert [[share.tokens for share in chosen.shares] for chosen in passes(agenda)] == [[1, CHUNK + 1]]


def test_small_micro_batches_go_forward_together_and_large_ones_alone() -> None:
    small = [forward(silo, number) for number in range(2) for silo in SILOS]
    assert planned(*small) == [small[:5], small[5:]]
    large = [forward(silo, 0, 4000) for silo in SILOS]
    assert planned(*large) == [[job] for job in large]


def test_a_group_goes_backward_when_it_is_complete_or_was_waited_for() -> None:
    agenda = Agenda()
    first, second = backward(NORTH, 0, group=7, due=1.0), backward(SOUTH, 0, group=7, due=1.5)
    agenda.add(first, 0.0)
    assert agenda.next_pass(0.5, CHUNK, {7: 2}) is None
    assert agenda.due() == 1.0
    agenda.add(second, 0.0)
    together = agenda.next_pass(0.5, CHUNK, {7: 2})
    assert together is not None
    assert jobs(together) == [first, second]
    agenda.add(late := backward(NORTH, 1, group=8, due=2.0), 0.0)
    (alone_now,) = passes(agenda, now=2.0, members={8: 2})
    assert jobs(alone_now) == [late]


def test_a_group_that_waits_does_not_hold_up_another() -> None:
    agenda = Agenda()
    waits, ready = backward(NORTH, 0, group=1, due=9.0), backward(SOUTH, 0, group=2, due=9.0)
    agenda.add(waits, 0.0)
    agenda.add(ready, 0.0)
    (chosen,) = passes(agenda, members={1: 2, 2: 1})
    assert jobs(chosen) == [ready]


def test_open_close_and_commit_keep_their_place_in_their_flow_alone() -> None:
    step, close, again = decode(NORTH), alone(NORTH, 0), decode(NORTH)
    other = decode(NORTH, 1)
    assert planned(step, close, again, other) == [[step, other], [close], [again]]
    work, commit, following = forward(NORTH, 0), alone(NORTH, "run"), forward(NORTH, 1)
    assert planned(work, commit, following, forward(SOUTH, 0))[1:] == [[commit], [following]]


def test_a_silo_that_is_gone_frees_nothing_before_its_last_request() -> None:
    gone = Job(NORTH, "alone")
    step = decode(NORTH)
    assert planned(step, gone) == [[step], [gone]]
    everybody = Job(b"", "alone")
    assert planned(decode(SOUTH), everybody, decode(EAST))[1] == [everybody]


def test_a_session_that_is_back_in_a_moment_is_waited_for_and_no_other() -> None:
    agenda = Agenda()
    near, far = decode(NORTH), decode(SOUTH)
    agenda.add(near, 0.0)
    agenda.add(far, 0.0)
    assert len(passes(agenda)) == 1
    agenda.answered([near], 1.0)
    agenda.answered([far], 1.0)
    # One is usually back after 10 ms, the other after 90; a pass takes 100.
    for job, at in ((decode(NORTH), 1.01), (decode(SOUTH), 1.09)):
        agenda.add(job, at)
        chosen = agenda.next_pass(at, CHUNK, {}, 0.1)
        assert chosen is not None
    agenda.answered([near], 2.0)
    agenda.answered([far], 2.0)
    agenda.add(back := decode(SOUTH), 2.001)
    assert agenda.next_pass(2.001, CHUNK, {}, 0.1) is None
    due = agenda.due()
    assert due is not None
    assert 2.01 < due < 2.02
    agenda.add(near := decode(NORTH), 2.009)
    together = agenda.next_pass(2.009, CHUNK, {}, 0.1)
    assert together is not None
    assert jobs(together) == [back, near]
    # Nobody waits beyond that, nor for one who takes long, nor when passes are short.
    agenda.answered([back], 3.0)
    agenda.answered([near], 3.0)
    agenda.add(back := decode(SOUTH), 3.001)
    assert agenda.next_pass(3.1, CHUNK, {}, 0.1) is not None
    agenda.add(near := decode(NORTH), 3.2)
    assert agenda.next_pass(3.2, CHUNK, {}, 0.1) is not None
    agenda.answered([near], 4.0)
    agenda.add(decode(SOUTH), 4.001)
    assert agenda.next_pass(4.001, CHUNK, {}, 0.01) is not None


@given(st.sampled_from(["alone", "decode", "backward"]), st.sampled_from(["decode", "backward", "forward"]))
def test_no_kind_waits_for_ever(busy: str, patient: str) -> None:
    """Whatever keeps coming, the other has its turn after a bounded number of passes."""
    if busy == patient:
        return
    agenda = Agenda()
    make: Any = {
        "alone": lambda silo: alone(silo, "run"),
        "decode": decode,
        "backward": lambda silo: backward(silo, 0),
    }[busy]
    other = {"decode": decode(EAST), "backward": backward(EAST, 0), "forward": forward(EAST, 0)}[patient]
    agenda.add(other, 0.0)
    for _ in range(_TURNS + 2):
        agenda.add(make(NORTH), 0.0)
        chosen = agenda.next_pass(0.0, CHUNK, {})
        assert chosen is not None
        if other in jobs(chosen):
            return
    raise AssertionError("it never ran")


class AgendaMachine(RuleBasedStateMachine):
    """Any requests in any order, against the rules told plainly."""

    def __init__(self) -> None:
        super().__init__()
        self.agenda, self.now = Agenda(), 0.0
        self.came: list[Job] = []
        self.size: dict[Job, int] = {}
        self.done: Counter[Job] = Counter()

    @rule(
        silo=st.sampled_from(SILOS), session=st.integers(0, 2), tokens=st.integers(1, 300), cut=st.booleans()
    )
    def extend(self, silo: bytes, session: int, tokens: int, cut: bool) -> None:
        self._add(prefill(silo, tokens, session, not cut) if tokens > 100 else decode(silo, session, tokens))

    @rule(silo=st.sampled_from(SILOS), number=st.integers(0, 3), tokens=st.integers(1, 900))
    def train(self, silo: bytes, number: int, tokens: int) -> None:
        self._add(forward(silo, number, tokens))

    @rule(silo=st.sampled_from(SILOS), number=st.integers(0, 3), group=st.none() | st.integers(0, 2))
    def back(self, silo: bytes, number: int, group: int | None) -> None:
        self._add(backward(silo, number, group, due=self.now + 1.0))

    @rule(silo=st.sampled_from(SILOS), flow=st.sampled_from([0, 1, "run"]))
    def commit(self, silo: bytes, flow: Any) -> None:
        self._add(alone(silo, flow))

    @rule(silo=st.sampled_from([*SILOS, b""]))
    def gone(self, silo: bytes) -> None:
        self._add(Job(silo, "alone"))

    @rule(seconds=st.sampled_from([0.0, 0.6, 2.0]), members=st.integers(1, 3))
    def run(self, seconds: float, members: int) -> None:
        self.now += seconds
        before = [job for job in self.came if self.done[job] < max(1, self.size[job])]
        chosen = self.agenda.next_pass(self.now, CHUNK, dict.fromkeys(range(3), members))
        if chosen is None:
            # Only backwards that still wait for others may be left, and what stands behind them.
            assert all(job.due > self.now for job in before[:1])
            return
        taken = jobs(chosen)
        assert len(set(taken)) == len(taken)
        assert len({job.unit for job in taken}) == len(taken) or chosen.kind == "alone"
        kinds = {job.kind for job in taken}
        assert kinds <= ({"decode", "prefill"} if chosen.kind == "decode" else {chosen.kind})
        for share in chosen.shares:
            job = share.job
            earlier = before[: before.index(job)]
            assert not [one for one in earlier if _in_the_way(one, job)]
            if job.tokens or share.tokens < self.size[job]:
                assert not job.whole
            self.done[job] += share.tokens or 1

    @invariant()
    def nothing_is_lost_or_done_twice(self) -> None:
        left = [job for job in self.came if self.done[job] < max(1, self.size[job])]
        assert list(self.agenda.waiting) == left
        assert all(self.done[job] + job.tokens == self.size[job] for job in left if self.size[job])

    def teardown(self) -> None:
        for _ in range(1000):
            self.now += 2.0
            if self.agenda.next_pass(self.now, CHUNK, {}) is None:
                break
        assert not self.agenda.waiting

    def _add(self, job: Job) -> None:
        self.came.append(job)
        self.size[job] = job.tokens
        self.agenda.add(job, self.now)


def _in_the_way(earlier: Job, later: Job) -> bool:
    if earlier.flow is None or later.flow is None:
        return b"" in (earlier.silo, later.silo) or earlier.silo == later.silo
    if earlier.flow != later.flow:
        return False
    return "alone" in (earlier.kind, later.kind) or earlier.unit == later.unit


TestAgenda = AgendaMachine.TestCase
