"""Ranges of blocks, and the partition that cuts a model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec.errors import UsageError
from codec.partition import Partition, Span

SPANS = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda ends: Span(min(ends), max(ends)))


@given(SPANS)
def test_a_span_is_written_and_read(span: Span) -> None:
    assert Span.parse(str(span)) == span
    assert len(span) == len(range(span.start, span.stop))


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "2:",
        ":3",
        "2",
        "2-3",
        "2:3:4",
        "-1:3",
        "a:b",
        " 1:2",
        "1:2 ",
        "1.0:2",
        "1_0:20",
        "²:³",
        "0x1:2",
    ],
)
def test_anything_else_is_not_a_range(text: str) -> None:
    with pytest.raises(UsageError, match="is not a range of blocks") as caught:
        Span.parse(text)
    assert "START:STOP" in caught.value.hint


@pytest.mark.parametrize("ends", [(3, 2), (-1, 2), (-2, -1)])
def test_a_span_does_not_run_backwards(ends: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=f"{ends[0]}:{ends[1]} is not a range of blocks"):
        Span(*ends)


def test_a_range_read_backwards_is_refused() -> None:
    with pytest.raises(UsageError, match="28:2 is not a range of blocks"):
        Span.parse("28:2")


@given(SPANS, SPANS)
def test_containing_is_containing_every_block(one: Span, other: Span) -> None:
    blocks = set(range(one.start, one.stop))
    if len(other):
        assert one.contains(other) is (set(range(other.start, other.stop)) <= blocks)
    assert one.contains(one)
    assert one.contains(Span(one.start, one.start))


@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 24))
def test_head_trunk_and_tail_cover_every_block_once(head: int, tail: int, blocks: int) -> None:
    partition = Partition(head, tail)
    if head + tail > blocks - 1:
        with pytest.raises(UsageError, match="leave no trunk") as caught:
            partition.spans(blocks)
        assert f"at most {blocks - 1}" in caught.value.hint
        return
    front, trunk, back = partition.spans(blocks)
    assert [i for span in (front, trunk, back) for i in range(span.start, span.stop)] == [*range(blocks)]
    assert (len(front), len(back)) == (head, tail)
    assert len(trunk) >= 1


@pytest.mark.parametrize("cut", [(-1, 0), (0, -1), (-1, 5)])
def test_a_negative_partition_is_refused(cut: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="cannot be negative"):
        Partition(*cut).spans(4)
