"""KV caches: what they hold, how much they take, and what they refuse."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec.errors import LimitError
from workers.abreast import runs
from workers.kv import PAGE, KVMemory, KVShape, RowCache
from workers.slab import Slab, shares

CPU = torch.device("cpu")
SHAPE = KVShape(layers=3, groups=2, dim=4, dtype=torch.float32, device=CPU)


def values(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(1, 2, tokens, 4, generator=torch.Generator().manual_seed(seed))


def resident() -> int:
    """Bytes of memory that are this process's own."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) << 10


@pytest.mark.skipif(not shares(CPU), reason="a slab is one row here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_system_lends_what_rows_hold_and_gets_it_back(dtype: torch.dtype) -> None:
    shape, memory = KVShape(layers=5, groups=4, dim=64, dtype=dtype, device=CPU), KVMemory()
    rows = [RowCache(shape, 3000, memory) for _ in range(20)]
    new = torch.ones(1, 4, 100, 64, dtype=dtype)
    for row in rows:
        row.check_room(100)
        row.append(0, new, new)
    before = resident() - sum(2 * new.nbytes for _ in rows)
    for steps in (3, 7, 2):
        for row in rows:
            for _ in range(steps):
                row.check_room(100)
                for layer in range(5):
                    row.append(layer, new, new)
                row.advance(100)
        held = sum(2 * 5 * new.nbytes * row.length // 100 for row in rows)
        assert held <= memory.held <= 1.6 * held
        assert resident() - before == pytest.approx(held, abs=0.1 * held)
        for row in rows[: len(rows) // 2]:
            row.free()
        del rows[: len(rows) // 2]
        held = sum(2 * 5 * new.nbytes * row.length // 100 for row in rows)
        assert resident() - before == pytest.approx(held, abs=0.1 * held + (1 << 20))
    for row in rows:
        row.free()
    assert memory.held == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capacity", [1, 17])
def test_bytes_for_is_what_keys_and_values_take(dtype: torch.dtype, capacity: int) -> None:
    shape = KVShape(layers=3, groups=2, dim=4, dtype=dtype, device=CPU)
    row = RowCache(shape, capacity)
    row.check_room(capacity)
    taken = 0
    for layer in range(3):
        key, value = row.append(layer, values(capacity).to(dtype), values(capacity).to(dtype))
        taken += key.nbytes + value.nbytes
    assert row.bytes == shape.bytes_for(capacity) == taken == 2 * 3 * 2 * 4 * capacity * dtype.itemsize


def test_the_new_tokens_follow_the_old_in_each_block() -> None:
    row = RowCache(SHAPE, 7)
    row.check_room(7)
    written = [[(values(n, 10 * b + n), values(n, 99 + b)) for n in (4, 1, 2)] for b in range(3)]
    for step, new in enumerate((4, 1, 2)):
        for block in range(3):
            key, value = row.append(block, *written[block][step])
            expected = [torch.cat(pair, 2) for pair in zip(*written[block][: step + 1], strict=True)]
            assert torch.equal(key, expected[0])
            assert torch.equal(value, expected[1])
        row.advance(new)
    assert row.length == 7


def test_until_advance_a_pass_can_be_repeated() -> None:
    row = RowCache(SHAPE, 4)
    row.check_room(4)
    row.append(0, values(2, 1), values(2, 2))
    row.advance(2)
    row.append(0, values(2, 3), values(2, 4))
    assert row.length == 2
    key, value = row.append(0, values(1, 5), values(1, 6))
    assert torch.equal(key, torch.cat([values(2, 1), values(1, 5)], 2))
    assert torch.equal(value, torch.cat([values(2, 2), values(1, 6)], 2))


def test_rewind_forgets_and_never_invents() -> None:
    row = RowCache(SHAPE, 6)
    row.check_room(6)
    row.append(0, values(5, 1), values(5, 2))
    row.advance(5)
    row.rewind(5)
    assert row.length == 5
    row.rewind(3)
    key, _ = row.append(0, values(1, 3), values(1, 4))
    assert torch.equal(key, torch.cat([values(5, 1)[:, :, :3], values(1, 3)], 2))
    with pytest.raises(LimitError, match="position 4, the cache ends at 3") as caught:
        row.rewind(4)
    assert caught.value.at == "silo"
    assert row.length == 3


@pytest.mark.parametrize("held", [0, 3, 5])
def test_check_room_refuses_the_first_token_too_many(held: int) -> None:
    row = RowCache(SHAPE, 5)
    row.check_room(held)
    row.advance(held)
    row.check_room(5 - held)
    with pytest.raises(LimitError, match="6 tokens do not fit a session row of 5") as caught:
        row.check_room(6 - held)
    assert caught.value.at == "silo"
    assert "--max-tokens" in caught.value.hint
    assert row.length == held


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=8), st.integers(0, 99))
def test_a_row_holds_what_a_list_would(steps: list[tuple[int, int]], seed: int) -> None:
    """Rolling back and writing anew, as rejected or repeated tokens do."""
    row, kept = RowCache(SHAPE, 64), values(0)
    for index, (back, new) in enumerate(steps):
        start = max(0, row.length - back)
        row.rewind(start)
        kept = torch.cat([kept[:, :, :start], values(new, seed + index)], 2)
        row.check_room(new)
        key, value = row.append(1, values(new, seed + index), -values(new, seed + index))
        row.advance(new)
        assert torch.equal(key, kept)
        assert torch.equal(value, -kept)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=20))
def test_a_row_takes_pages_as_it_grows_and_keeps_what_it_held(steps: list[int]) -> None:
    capacity = sum(steps)
    memory = KVMemory(SHAPE.bytes_for(capacity))
    row, kept = RowCache(SHAPE, capacity, memory), values(0)
    assert memory.held == 0
    for seed, new in enumerate(steps):
        row.check_room(new)
        kept = torch.cat([kept, values(new, seed)], 2)
        key, _ = row.append(2, values(new, seed), values(new, seed))
        row.advance(new)
        assert torch.equal(key, kept)
        assert memory.held == row.bytes
        assert row.bytes <= SHAPE.bytes_for(min(capacity, int(1.5 * row.length) + PAGE))
    row.free()
    assert memory.held == 0


def test_rows_share_one_budget_and_the_last_tokens_fit() -> None:
    memory = KVMemory(SHAPE.bytes_for(2 * PAGE))
    first, second = RowCache(SHAPE, 1000, memory), RowCache(SHAPE, 1000, memory)
    first.check_room(PAGE + 1)  # It would have two pages, and second none.
    first.advance(PAGE + 1)
    with pytest.raises(LimitError, match="KV cache are needed") as caught:
        second.check_room(1)
    assert caught.value.at == "worker"
    assert "--kv-memory" in caught.value.hint
    first.free()
    second.check_room(PAGE)
    second.advance(PAGE)
    first.check_room(1)
    first.free()
    second.check_room(1)  # Half as much again does not fit, one token does.
    memory.held = memory.budget
    asked: list[int] = []
    memory.make_room = asked.append
    with pytest.raises(LimitError):
        first.check_room(1)
    assert asked == [SHAPE.bytes_for(1)], "nobody makes room for more than is needed"


def test_a_row_that_is_set_back_after_it_grew_holds_what_it_held() -> None:
    row, held = RowCache(SHAPE, 1000), values(60, 1)
    row.check_room(60)
    row.append(0, held, -held)
    row.advance(60)
    row.rewind(0)
    row.check_room(100)
    row.length = 60
    row.check_room(1)
    key, value = row.append(0, values(1, 2), values(1, 3))
    assert torch.equal(key[:, :, :60], held)
    assert torch.equal(value[:, :, :60], -held)


def test_memory_that_the_system_refuses_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = KVMemory(1 << 30)
    row = RowCache(SHAPE, 1000, memory)
    row.check_room(10)
    before = memory.held

    def refuse(*_: object) -> Slab:
        raise MemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("workers.kv.Slab", refuse)
        with pytest.raises(MemoryError, match="out of memory"):
            row.check_room(500)
    assert memory.held == before == row.bytes
    row.check_room(500)
    row.free()
    assert memory.held == 0


@given(st.dictionaries(st.integers(0, 70), st.integers(1, 900)))
def test_rows_share_a_call_where_little_is_wasted(lengths: dict[int, int]) -> None:
    rows = sorted(lengths.items())
    found = runs(rows)
    assert [index for run in found for index in run] == list(range(len(rows)))
    for run in found:
        slots, tokens = zip(*(rows[index] for index in run), strict=True)
        read = (slots[-1] - slots[0] + 1) * max(tokens)
        assert len(run) == 1 or read <= 1.5 * sum(max(PAGE, length) for length in tokens)


def test_rows_of_about_one_length_without_gaps_share_one_call() -> None:
    assert runs([(slot, 200 + 5 * slot) for slot in range(16)]) == [range(16)]
    assert runs([(slot, 1 + slot) for slot in range(16)]) == [range(16)]


def test_a_slot_is_zero_for_whoever_takes_it_next() -> None:
    memory = KVMemory()
    stays, goes = RowCache(SHAPE, 50, memory), RowCache(SHAPE, 50, memory)
    for row in (stays, goes):
        row.check_room(50)
        row.append(1, values(50), values(50))
    goes.free()
    following = RowCache(SHAPE, 50, memory)
    following.check_room(50)
    assert following.place is not None
    assert not following.place.tensor[following.place.slot].any()
    key, _ = stays.append(1, values(50), values(50))
    assert torch.equal(key, values(50))
