"""The line and the trunk, measured through the real router and a real worker."""

import time
from typing import Any

import msgspec
import pytest
import torch

from broker.parcel import Parcel
from broker.speed import Speed
from codec.messages import CloseSession, Extend, OpenSession, Result
from codec.partition import Span
from silo_agent.planning.line import measure_line
from silo_agent.remote import Remote, silo_attach

HERE = Speed(0.001, 1e9)


def measured(pool: Any, tiny: Any, speed: Speed | None = HERE, card: Any = None) -> Any:
    link = pool.broker.link(silo_attach("north"))
    link.speed = speed
    card = card or tiny.checkpoint.card(range(2, 4))
    return measure_line(Remote(link, deadline=30), link, card, Span(2, 4), torch.float32)


def test_the_trunk_is_timed_and_the_session_closed(pool: Any, tiny: Any) -> None:
    line = measured(pool, tiny)
    assert (line.speed, line.silent) == (HERE, "")
    results = [parcel.header for parcel in pool.sent(Result)]
    sent = [parcel.header.lengths for parcel in pool.sent(Extend)]
    assert line.trunk_s == pytest.approx(results[-1].seconds / sent[-1][0])
    assert line.trunk_s > 0
    assert sent[0] == (32,)
    opened, closed = pool.sent(OpenSession), pool.sent(CloseSession)
    assert {p.header.session for p in opened} == {p.header.session for p in closed}
    assert {(p.header.start, p.header.stop) for p in opened} == {(2, 4)}


def test_a_slow_answer_is_not_asked_for_again(bare_pool: Any, tiny: Any) -> None:
    def slowly(parcel: Parcel) -> None:
        if isinstance(parcel.header, Extend):
            time.sleep(0.6)

    bare_pool.start_moody_worker(slowly)
    line = measured(bare_pool, tiny)
    assert line.trunk_s is not None
    assert {parcel.header.lengths for parcel in bare_pool.sent(Extend)} == {(32,)}


def test_without_a_worker_it_says_so_at_once(bare_pool: Any, tiny: Any) -> None:
    begun = time.monotonic()
    line = measured(bare_pool, tiny, speed=None)
    assert time.monotonic() - begun < 1
    assert (line.speed, line.trunk_s) == (None, None)
    assert "no worker" in line.silent


def test_a_worker_with_another_model_is_no_trunk(pool: Any, tiny: Any) -> None:
    other = msgspec.structs.replace(tiny.checkpoint.card(range(2, 4)), fingerprint="another")
    line = measured(pool, tiny, card=other)
    assert line.trunk_s is None
    assert line.silent
