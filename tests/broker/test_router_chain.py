"""Sessions that several workers share: each stage is asked for its own blocks, one after another."""

from typing import Any

import pytest

from codec.messages import (
    CloseSession,
    Done,
    Error,
    Extend,
    Gone,
    MaskSpec,
    Opened,
    OpenRun,
    OpenSession,
    Result,
    TensorSpec,
)
from codec.plan import LoraPlan, RunPlan

BF16, F32 = TensorSpec("bf16", (3, 4), "raw", (24,)), TensorSpec("f32", (3, 4), "raw", (48,))
MASK = MaskSpec(3, 3, 0, 0)


def step(number: int, **fields: Any) -> Extend:
    usual = {"rows": (1, 0), "starts": (5, 0), "lengths": (1, 2), "tensors": (F32,), "wire": "q8"}
    return Extend(id=number, session="s", **{**usual, **fields})


def refusal(number: int, code: str = "limit") -> Error:
    return Error(id=number, code=code, what="no", side="worker")


@pytest.fixture
def stages(desk: Any) -> list[Any]:
    """Workers that host blocks 0:3, 2:5 and 5:6."""
    spans = {"first": (0, 3), "second": (2, 5), "third": (5, 6)}
    return [desk.worker(name, start=a, stop=b) for name, (a, b) in spans.items()]


@pytest.fixture
def silo(desk: Any, stages: list[Any]) -> Any:
    """With session "s" over blocks 1:6, opened with number 1."""
    party = desk.silo()
    party.opens("s", 1, start=1, stop=6)
    for stage in stages:
        stage.says(Opened(id=1), peer=party.alias)
        stage.read()
    assert party.read() == [Opened(id=1)]
    return party


def test_a_session_opens_when_all_its_stages_have_opened_it(desk: Any, stages: list[Any]) -> None:
    silo = desk.silo()
    silo.opens("s", 1, start=1, stop=6, rows=3, capacity=99)
    for stage, span in zip(stages, ((1, 3), (3, 5), (5, 6)), strict=True):
        (parcel,) = stage.inbox
        assert isinstance(parcel.header, OpenSession)
        assert (parcel.header.start, parcel.header.stop) == span
        assert (parcel.header.id, parcel.header.rows, parcel.header.capacity) == (1, 3, 99)
        assert parcel.peer == silo.alias
        assert silo.inbox == []
        stage.says(Opened(id=1), peer=silo.alias)
    assert silo.read() == [Opened(id=1)]
    assert [desk.load(stage) for stage in stages] == [1, 1, 1]


def test_each_stage_gets_its_part_of_an_adapter(desk: Any, stages: list[Any]) -> None:
    names = tuple(
        f"model.layers.{block}.q_proj.lora_{part}.weight" for block in (4, 1, 5, 3) for part in "AB"
    )
    specs = tuple(TensorSpec("f32", (1, n + 1), "raw", (4 * n + 4,)) for n in range(8))
    frames = [bytes([n]) * 4 * (n + 1) for n in range(8)]
    fields = {"start": 1, "stop": 6, "adapter": LoraPlan(), "names": names, "tensors": specs}
    silo = desk.silo()
    silo.says(
        OpenSession(id=1, session="s", model=stages[0].attach.model, rows=1, capacity=9, **fields), frames
    )
    for stage, mine in zip(stages, ([2, 3], [0, 1, 6, 7], [4, 5]), strict=True):
        (parcel,) = stage.inbox
        assert parcel.header.names == tuple(names[n] for n in mine)
        assert parcel.header.tensors == tuple(specs[n] for n in mine)
        assert list(parcel.tensors) == [frames[n] for n in mine]
        assert all(frame is frames[n] for frame, n in zip(parcel.tensors, mine, strict=True))


def test_an_adapter_that_makes_no_sense_reaches_a_worker_that_says_so(desk: Any, stages: list[Any]) -> None:
    fields = {"model": stages[0].attach.model, "start": 1, "stop": 6, "rows": 1, "capacity": 9}
    silo = desk.silo()
    silo.says(
        OpenSession(id=1, session="s", names=("lm_head", "model.layers.0.x"), tensors=(F32, F32), **fields),
        [b"a", b"b"],
    )
    assert [parcel.header.names for stage in stages for parcel in stage.inbox] == [
        ("lm_head", "model.layers.0.x"), (), ()
    ]  # fmt: skip
    for stage in stages:
        stage.read()
    silo.says(OpenSession(id=2, session="t", names=("model.layers.4.x",), **fields), [b"a", b"b"])
    for stage in stages:
        (parcel,) = stage.inbox
        assert (parcel.header.names, parcel.header.tensors, parcel.tensors) == (
            ("model.layers.4.x",),
            (),
            [b"a", b"b"],
        )


def test_hidden_states_pass_the_stages_as_they_are(stages: list[Any], silo: Any) -> None:
    """Only the answer to the silo is encoded as it asked, and the mask reaches every stage."""
    silo.says(step(2, mask=MASK), [b"from the silo", b"mask"])
    spec, frames = F32, [b"from the silo", b"mask"]
    for n, stage in enumerate(stages):
        (parcel,) = stage.inbox
        wire = "q8" if stage is stages[-1] else "raw"
        assert parcel.header == step(2, mask=MASK, tensors=(spec,), wire=wire)
        assert list(parcel.tensors) == frames
        assert not any(later.inbox for later in stages[n + 1 :])
        spec, frames = BF16, [f"from {stage.attach.name}".encode(), b"mask"]
        stage.says(Result(id=2, tensors=(BF16,), seconds=0.25), frames[:1], peer=silo.alias)
    (answer,) = silo.inbox
    assert answer.header == Result(id=2, tensors=(BF16,), seconds=0.75)
    assert (list(answer.tensors), answer.peer) == ([b"from third"], b"")


def test_requests_pass_one_after_another(stages: list[Any], silo: Any) -> None:
    silo.says(step(2))
    silo.says(step(3))
    silo.says(CloseSession(id=4, session="s"))
    for number in (2, 3):
        for stage in stages:
            assert [header.id for header in stage.read()] == [number]
            stage.says(Result(id=number), peer=silo.alias)
    for stage in stages:
        assert stage.read() == [CloseSession(id=4, session="s")]
        stage.says(Done(id=4), peer=silo.alias)
    assert [header.id for header in silo.read()] == [2, 3, 4]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_at_any_stage_is_the_answer(stages: list[Any], silo: Any, failing: int) -> None:
    silo.says(step(2))
    for stage in stages[:failing]:
        stage.says(Result(id=2), peer=silo.alias)
    stages[failing].says(refusal(2), peer=silo.alias)
    assert silo.read() == [refusal(2)]
    for stage in stages:
        stage.read()
    silo.says(step(3))
    assert [header.id for header in stages[0].read()] == [3]


def test_a_session_that_one_stage_refuses_is_closed_at_all(desk: Any, stages: list[Any]) -> None:
    silo = desk.silo()
    silo.opens("s", 1, start=1, stop=6)
    silo.says(step(2))
    for stage, answer in zip(stages, (Opened(id=1), refusal(1), refusal(1, "mismatch")), strict=True):
        stage.read()
        stage.says(answer, peer=silo.alias)
    assert silo.read() == [refusal(1)], "the first"
    assert stages[0].read() == [CloseSession(session="s"), step(2, wire="raw")]
    for stage in stages[1:]:
        assert stage.read() == [CloseSession(session="s")]
        stage.says(refusal(0), peer=silo.alias)
    stages[0].says(Done(), peer=silo.alias)
    assert silo.read() == []
    stages[0].says(refusal(2, "unknown-name"), peer=silo.alias)
    assert silo.read() == [refusal(2, "unknown-name")]
    assert [desk.load(stage) for stage in stages] == [0, 0, 0]
    silo.extends("s", 3)
    assert silo.reads_error().code == "unknown-name"


def test_a_name_is_free_when_every_stage_has_closed_it(desk: Any, stages: list[Any], silo: Any) -> None:
    silo.says(CloseSession(id=2, session="s"))
    for stage in stages:
        assert desk.load(stage) == 1
        stage.says(Done(id=2), peer=silo.alias)
    assert [desk.load(stage) for stage in stages] == [0, 0, 0]
    silo.read()
    silo.extends("s", 3)
    assert silo.reads_error().code == "unknown-name"


def test_it_may_be_opened_again_over_the_same_blocks(stages: list[Any], silo: Any) -> None:
    silo.opens("s", 2, start=2, stop=6)
    error = silo.reads_error()
    assert (error.id, error.code) == (2, "mismatch")
    assert "1:6, not 2:6" in error.what
    silo.says(CloseSession(id=3, session="s"))
    silo.opens("s", 4, start=1, stop=6)
    for stage in stages:
        stage.says(Done(id=3), peer=silo.alias)
    for stage in stages:
        assert [header.id for header in stage.read()] == [3, 4]
        stage.says(Opened(id=4), peer=silo.alias)
    assert [header.id for header in silo.read()] == [3, 4]


@pytest.mark.parametrize("dies", [0, 1, 2])
def test_a_stage_that_dies_takes_the_session_with_it(
    desk: Any, stages: list[Any], silo: Any, dies: int
) -> None:
    silo.says(step(2))
    stages[0].says(Result(id=2), peer=silo.alias)  # So it is at the second.
    silo.says(step(3))
    for stage in stages:
        stage.read()
    stages[dies].leaves()
    errors = silo.read()
    assert [(e.id, e.code) for e in errors] == [(2, "unavailable"), (3, "unavailable")]
    left = [stage for stage in stages if stage is not stages[dies]]
    for stage in left:
        assert stage.read() == [CloseSession(session="s")]
        assert desk.load(stage) == 0
        stage.says(Done(), peer=silo.alias)
    silo.says(step(4))
    assert "left, and 's' with it" in silo.reads_error().what
    owed = dies != 1  # The second has yet to answer.
    silo.opens("t", 2, start=2, stop=3)
    assert (silo.inbox != []) is owed
    if owed:
        assert silo.reads_error().code == "protocol"
        stages[1].says(Result(id=2), peer=silo.alias)
        assert desk.router.peers[stages[1].route].inbox.tokens_under_way == 0
        silo.opens("t", 2, start=2, stop=3)
        assert silo.read() == []


def test_what_waits_at_a_stage_is_not_sent_when_another_dies(desk: Any) -> None:
    first, second = desk.worker("first", stop=3), desk.worker("second", start=3, credit=1)
    busy, silo = desk.silo("busy"), desk.silo()
    busy.opens("b", 1, start=3, stop=4)
    busy.extends("b", 2)
    silo.opens("s", 1, start=1, stop=6)
    for stage in (first, second):
        stage.says(Opened(id=1), peer=silo.alias)
    silo.extends("s", 2)
    first.says(Result(id=2), peer=silo.alias)
    assert desk.router.peers[second.route].inbox.waiting == 1
    second.read(), silo.read()
    first.leaves()
    assert [header.id for header in silo.read()] == [2]
    assert second.read() == [CloseSession(session="s")]
    second.says(Result(id=2), peer=busy.alias)
    assert second.read() == []
    silo.opens("t", 2, start=3, stop=4)
    assert [header.id for header in second.read()] == [2], "nobody owes an answer to number 2"


def test_every_stage_is_told_when_the_silo_is_gone(desk: Any, stages: list[Any], silo: Any) -> None:
    silo.says(step(2))
    stages[0].read()
    silo.leaves()
    for stage in stages:
        assert stage.read() == [Gone(name="north")]
        assert desk.load(stage) == 0
    stages[0].says(Result(id=2), peer=silo.alias)
    assert stages[1].read() == []
    assert desk.router.peers[stages[0].route].inbox.tokens_under_way == 0


def test_a_stage_waits_for_its_own_credit(desk: Any) -> None:
    first, second = desk.worker("first", stop=3, credit=3), desk.worker("second", start=3, credit=3)
    silos = [desk.silo("north"), desk.silo("south")]
    for silo in silos:
        silo.opens("s", 1, start=1, stop=6)
        for stage in (first, second):
            stage.says(Opened(id=1), peer=silo.alias)
            stage.read()
        silo.read()
    for silo in silos:
        silo.says(step(2))
    assert len(first.inbox) == 1
    first.says(Result(id=2), peer=silos[0].alias)
    assert [parcel.peer for parcel in first.inbox] == [silo.alias for silo in silos]
    first.says(Result(id=2), peer=silos[1].alias)
    assert [parcel.peer for parcel in second.inbox] == [silos[0].alias]
    second.says(Result(id=2), peer=silos[0].alias)
    assert [parcel.peer for parcel in second.inbox] == [silo.alias for silo in silos]
    second.says(Result(id=2), peer=silos[1].alias)
    assert [len(silo.inbox) for silo in silos] == [1, 1]


def test_a_run_has_one_home(desk: Any, stages: list[Any]) -> None:
    silo = desk.silo()
    silo.says(OpenRun(id=1, run="r", model=stages[0].attach.model, start=1, stop=6, plan=RunPlan()))
    error = silo.reads_error()
    assert (error.code, error.side) == ("mismatch", "worker")
    assert "the workers host 0:3, 2:5, 5:6" in error.what
