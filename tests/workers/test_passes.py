"""Which requests share a pass: as many as may, none that must not, and each silo's in their order."""

from hypothesis import given
from hypothesis import strategies as st

from workers.passes import MAX_PASS_TOKENS, Waiting, plan_passes

SILOS = st.sampled_from([b"north", b"south", b"east"])
REQUESTS = st.lists(
    st.builds(
        lambda silo, place, session, tokens: Waiting(silo, place, place and (silo, session), tokens),
        SILOS,
        st.sampled_from([None, "base", "adapter"]),
        st.integers(0, 3),
        st.integers(1, MAX_PASS_TOKENS + 10),
    ),
    max_size=40,
)


@given(REQUESTS)
def test_every_request_is_in_one_pass_that_may_have_it(waiting: list[Waiting]) -> None:
    passes = plan_passes(waiting)
    assert sorted(index for members in passes for index in members) == list(range(len(waiting)))
    for members in passes:
        chosen = [waiting[index] for index in members]
        assert len({request.place for request in chosen}) == 1
        if len(chosen) > 1:
            assert chosen[0].place is not None
            assert len({request.unit for request in chosen}) == len(chosen)
            assert sum(request.tokens for request in chosen) <= MAX_PASS_TOKENS


@given(REQUESTS)
def test_a_silos_requests_keep_their_order(waiting: list[Waiting]) -> None:
    number = {index: n for n, members in enumerate(plan_passes(waiting)) for index in members}
    for silo in {request.silo for request in waiting}:
        own = [number[index] for index, request in enumerate(waiting) if request.silo == silo]
        assert own == sorted(own)


@given(st.integers(1, 60))
def test_sessions_at_one_place_run_together_whoever_has_them(sessions: int) -> None:
    waiting = [Waiting(b"%d" % (n % 7), "base", n, 1 + n % 5) for n in range(sessions)]
    assert plan_passes(waiting) == [list(range(sessions))]


def test_what_comes_between_does_not_keep_sessions_apart() -> None:
    step = Waiting(b"north", "base", ("north", "s"), 1)
    other = Waiting(b"south", "base", ("south", "s"), 1)
    commit = Waiting(b"east")
    assert plan_passes([step, commit, other]) == [[0, 2], [1]]


def test_a_session_waits_for_its_own_request_before() -> None:
    step = Waiting(b"north", "base", ("north", "s"), 1)
    close = Waiting(b"north")
    assert plan_passes([step, step]) == [[0], [1]]
    assert plan_passes([step, close, step]) == [[0], [1], [2]]
