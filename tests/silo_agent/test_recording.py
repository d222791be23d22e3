"""What must be sent again, against rows of tokens that are written and overwritten one by one."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from codec.messages import Extend
from silo_agent.packed import Packed
from silo_agent.recording import Recording, needed

Token = tuple[int, int, int]
"""Which extend wrote it, in which row, where."""


def rows_after(extends: Sequence[Extend], numbers: Sequence[int]) -> dict[int, list[Token]]:
    """The rows as a worker would have them; an extend beyond a row's end is refused."""
    held: dict[int, list[Token]] = {}
    for number in numbers:
        extend = extends[number]
        for row, start, length in zip(extend.rows, extend.starts, extend.lengths, strict=True):
            tokens = held.setdefault(row, [])
            assert start <= len(tokens), "beyond the row's end"
            tokens[start:] = [(number, row, at) for at in range(start, start + length)]
    return held


@st.composite
def histories(draw: st.DrawFn, rows: int) -> list[Extend]:
    lengths = [0] * rows
    made = []
    for _ in range(draw(st.integers(1, 12))):
        chosen = draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows, unique=True))
        starts = [draw(st.integers(0, lengths[row])) for row in chosen]
        new = [draw(st.integers(1, 4)) for _ in chosen]
        for row, start, length in zip(chosen, starts, new, strict=True):
            lengths[row] = start + length
        made.append(Extend(session="s", rows=tuple(chosen), starts=tuple(starts), lengths=tuple(new)))
    return made


@given(histories(rows=3))
def test_what_is_needed_makes_the_same_rows(extends: list[Extend]) -> None:
    kept = needed(extends)
    assert kept == sorted(set(kept))
    assert rows_after(extends, kept) == rows_after(extends, range(len(extends)))


@given(histories(rows=1))
def test_in_one_row_only_what_is_still_there_is_needed(extends: list[Extend]) -> None:
    there = {number for number, _, _ in rows_after(extends, range(len(extends)))[0]}
    assert needed(extends) == sorted(there)


@given(histories(rows=3))
def test_a_recording_makes_the_same_rows_or_was_given_up(extends: list[Extend]) -> None:
    ends = [
        (row, start + length)
        for extend in extends
        for row, start, length in zip(extend.rows, extend.starts, extend.lengths, strict=True)
    ]
    capacity = sum(max((end for row, end in ends if row == wanted), default=0) for wanted in range(3))
    recording = Recording(capacity)
    for number, extend in enumerate(extends):
        recording.add(Packed(extend, (number,), sum(extend.lengths)))
        assert sum(each.tokens for each in recording.packed or ()) <= 3 * capacity
    if recording.packed is not None:
        kept = [each.frames[0] for each in recording.packed]
        assert rows_after(extends, kept) == rows_after(extends, range(len(extends)))


def extend(start: int, length: int) -> Packed:
    return Packed(Extend(session="s", rows=(0,), starts=(start,), lengths=(length,)), (), length)


def test_a_row_overwritten_bit_by_bit_is_given_up() -> None:
    """Frames are kept whole: a token of each is still there, and all of them would fill the memory."""
    recording = Recording(100)
    for start in range(50):
        recording.add(extend(start, 50))
        if recording.packed is None:
            break
        assert sum(each.tokens for each in recording.packed) <= 200
    assert recording.packed is None
    recording.add(extend(0, 5))
    assert recording.packed is None


def test_starting_over_forgets_what_was_before() -> None:
    recording = Recording(100)
    for _ in range(1000):
        recording.add(extend(0, 60))
        recording.add(extend(60, 40))
    assert recording.packed is not None
    assert [each.tokens for each in recording.packed] == [60, 40]
