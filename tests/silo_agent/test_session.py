"""A silo's own parts, and a session over all three, when things go well and when they do not."""

from threading import Thread
from typing import Any

import pytest
import torch

from broker.parcel import Parcel
from codec.errors import DeadlineError, LimitError, UnavailableError, UnknownNameError, UsageError
from codec.messages import CloseSession, Opened
from codec.plan import LoraPlan
from silo_agent.remote import Remote

IDS = list(range(20, 40))


@pytest.mark.parametrize("partition", [(2, 2), (0, 0), (5, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_lm_head_is_the_heads_embeddings(pool: Any, partition: Any, dtype: torch.dtype) -> None:
    ends = pool.ends(*partition, dtype=dtype)
    lm_head = ends.tail.model.lm_head.weight
    assert lm_head.data_ptr() == ends.head.embeddings.data_ptr()
    assert lm_head.dtype == dtype
    ends.adapt(LoraPlan(rank=2), seed=0)
    assert ends.tail.model.lm_head.weight.data_ptr() == ends.head.embeddings.data_ptr()


def test_a_silo_holds_its_ends_and_no_more(pool: Any, tiny: Any) -> None:
    ends = pool.ends(1, 2)
    total = sum(weight.nbytes for weight in tiny.whole.parameters())
    embeddings = ends.head.embeddings.nbytes
    block = sum(weight.nbytes for weight in tiny.whole.model.layers[0].parameters())
    held = ends.head.weight_bytes + ends.tail.weight_bytes - embeddings
    assert held == total - 3 * block
    assert (str(ends.head.blocks), str(ends.trunk), str(ends.tail.blocks)) == ("0:1", "1:4", "4:6")
    assert len(ends.card.samples) == 3


def test_ends_begin_without_an_adapter_and_with_a_no_op(pool: Any) -> None:
    ends = pool.ends()
    assert ends.adapter() == {}
    ends.adapt(LoraPlan(rank=2, targets=("q_proj",)), seed=3)
    blocks = sorted({int(name.split(".")[2]) for name in ends.adapter()})
    assert blocks == [0, 1, 4, 5]
    assert all(not tensor.any() for name, tensor in ends.adapter().items() if ".lora_B." in name)
    assert all(tensor.any() for name, tensor in ends.adapter().items() if ".lora_A." in name)
    assert {int(name.split(".")[2]) for name in ends.head_adapter()} == {0, 1}


@pytest.mark.parametrize("partition", [(4, 2), (-1, 2), (6, 0)])
def test_a_partition_that_leaves_no_trunk(pool: Any, partition: tuple[int, int]) -> None:
    with pytest.raises(UsageError):
        pool.ends(*partition)


def test_rows_are_independent_and_can_be_rolled_back(pool: Any, tiny: Any) -> None:
    expected = tiny.logits(IDS)
    with pool.session(rows=3) as session:
        session.extend([2, 0], [IDS[:5], [7, 8, 9]])
        session.extend([2], [[400, 401, 402]])
        rolled = session.extend([2], [IDS[5:]], starts=[5])
        other = session.extend([1], [IDS])
        again = session.extend([2, 0], [IDS[3:], IDS], starts=[3, 0])
    for logits in (rolled, other, again[:1], again[1:]):
        torch.testing.assert_close(logits[0], expected[-1], atol=2e-5, rtol=0)


def test_a_start_beyond_the_row_and_a_full_row(pool: Any) -> None:
    with pool.session(capacity=8) as session:
        session.extend([0], [IDS[:4]])
        before = len(pool.sent())
        with pytest.raises(LimitError, match="start at position 5, the cache ends at 4"):
            session.extend([0], [[1]], starts=[5])
        with pytest.raises(LimitError, match="9 tokens do not fit a session row of 8"):
            session.extend([0], [IDS[:5]])
        assert len(pool.sent()) == before, "this was known before anything was sent"


@pytest.mark.parametrize("size", [{"rows": 0}, {"rows": 4097}, {"capacity": 0}, {"capacity": 1 << 21}])
def test_a_session_of_no_or_too_many_rows(pool: Any, size: dict[str, int]) -> None:
    with pytest.raises(LimitError, match="a session has 1 to 4096 rows"):
        pool.session(**size)


def test_leaving_frees_the_workers_caches(bare_pool: Any) -> None:
    ends = bare_pool.ends()
    # Room for one session at a time, whether a worker counts all its six blocks or the trunk's two.
    a_block = ends.head.kv_shape().bytes_for(100) // len(ends.head.blocks)
    bare_pool.start_worker(kv_bytes=6 * a_block)
    for _ in range(6):
        with bare_pool.session(capacity=100, ends=ends) as session:
            session.extend([0], [IDS])
    with (
        bare_pool.session(capacity=1000, ends=ends) as session,
        pytest.raises(LimitError, match="KV cache") as caught,
    ):
        session.extend([0], [[5] * 301])
    assert caught.value.at == "worker"
    assert "--kv-memory" in caught.value.hint


def test_a_lost_worker_is_reported_and_closing_does_not_hide_it(pool: Any) -> None:
    def lose() -> None:
        with pool.session(wait=0.1) as session:
            session.extend([0], [IDS])
            pool.lose_workers()
            session.extend([0], [[5]])

    with pytest.raises(UnavailableError, match=r"worker 'pool' left.*no worker is attached") as caught:
        lose()
    assert caught.value.at == "worker"


def test_an_interrupted_session_is_closed_without_waiting(bare_pool: Any) -> None:
    worker = bare_pool.attach_worker()
    remote = bare_pool.remote(deadline=30)
    opened = answer_in_time(bare_pool, worker, remote)
    with pytest.raises(KeyboardInterrupt), opened:
        raise KeyboardInterrupt
    assert any(isinstance(parcel.header, CloseSession) for parcel in bare_pool.broker.passed)


def answer_in_time(pool: Any, worker: Any, remote: Remote) -> Any:
    """A session whose worker answered the opening, and then nothing more."""

    def answer() -> None:
        parcel = worker.receive(10)
        worker.send(Parcel.of(Opened(id=parcel.header.id), peer=parcel.peer))

    thread = Thread(target=answer)
    thread.start()
    session = pool.session(remote=remote)
    thread.join()
    return session


def test_after_a_lost_answer_the_session_can_go_on(pool: Any, tiny: Any) -> None:
    """The head and the worker are ahead of the tail then; the next call rolls them back."""
    remote = pool.remote()
    with pool.session(remote=remote) as session:
        session.extend([0], [IDS[:5]])
        remote._deadline = 1e-6
        with pytest.raises(DeadlineError, match="no answer to extend"):
            session.extend([0], [[400, 401]])
        remote._deadline = 30.0
        logits = session.extend([0], [IDS[5:]])
    torch.testing.assert_close(logits[0], tiny.logits(IDS)[-1], atol=2e-5, rtol=0)


def test_another_silo_can_neither_see_nor_close_it(pool: Any) -> None:
    with pool.session() as session:
        session.extend([0], [IDS])
        stranger = pool.remote(name="south")
        with pytest.raises(UnknownNameError, match="no session"):
            stranger.call(CloseSession(session=session._name))
        session.extend([0], [[5]])
