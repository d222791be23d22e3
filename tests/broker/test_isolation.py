"""Names are their opener's: a stranger's guess gets the answer of a name that does not exist."""

from typing import Any

import pytest

from codec.messages import (
    Backward,
    CloseRun,
    CloseSession,
    Commit,
    Error,
    Extend,
    Forward,
    GetAdapter,
    Opened,
    OpenRun,
    encode_header,
)
from codec.plan import ModelCard, RunPlan

CARD = ModelCard(name="m", fingerprint="f", blocks=6, hidden=4)
GUESSES: dict[str, Any] = {
    "extend": lambda name: Extend(id=1, session=name, rows=(0,), starts=(0,), lengths=(1,)),
    "close-session": lambda name: CloseSession(id=1, session=name),
    "forward": lambda name: Forward(id=1, run=name, microbatch=0, lengths=(1,)),
    "backward": lambda name: Backward(id=1, run=name, microbatch=0),
    "commit": lambda name: Commit(id=1, run=name, step=0, loss_tokens=1, square_norm=0.0),
    "get-adapter": lambda name: GetAdapter(id=1, run=name),
    "close-run": lambda name: CloseRun(id=1, run=name),
}


def joining(number: int, *members: str, silos: int = 2) -> OpenRun:
    plan = RunPlan(silos=silos, members=members)
    return OpenRun(id=number, run="ours", model=CARD, start=2, stop=4, plan=plan)


@pytest.mark.parametrize("kind", GUESSES)
@pytest.mark.parametrize("members", [(), ("north", "south")])
def test_another_silos_name_is_answered_as_one_that_does_not_exist(
    desk: Any, kind: str, members: tuple[str, ...]
) -> None:
    worker, north, west = desk.worker(), desk.silo("north"), desk.silo("west")
    north.opens("ours", 1)
    north.says(joining(2, *members))
    for number in (1, 2):
        worker.says(Opened(id=number), peer=north.alias)
    worker.read()
    west.says(GUESSES[kind]("ours"))
    foreign = [frame for parcel in west.inbox for frame in parcel.frames()]
    west.read()
    west.says(GUESSES[kind]("hers"))  # As long: it is quoted.
    unknown = [frame for parcel in west.inbox for frame in parcel.frames()]
    assert [frame.replace(b"ours", b"hers") for frame in foreign] == unknown
    assert west.reads_error().code == "unknown-name"
    assert worker.read() == [], "it is not even asked"


def test_a_run_is_its_members_and_its_name(desk: Any) -> None:
    near, far = desk.worker("near"), desk.worker("far")
    north, south, west = desk.silo("north"), desk.silo("south"), desk.silo("west")
    north.says(joining(1, "north", "south"))
    west.says(joining(1, "west", silos=1))
    south.says(joining(1, "north", "south"))
    home = {parcel.peer: worker for worker in (near, far) for parcel in worker.inbox}
    assert home.keys() == {north.alias, south.alias, west.alias}
    assert home[north.alias] is home[south.alias]
    assert {members for members, _ in desk.router.registry.runs} == {("north", "south"), ("west",)}
    assert desk.load(near) + desk.load(far) == 2, "two runs of one name"


def test_who_is_not_a_member_cannot_say_so(desk: Any) -> None:
    worker, west = desk.worker(), desk.silo("west")
    west.says(joining(1, "north", "south"))
    error = west.reads_error()
    assert (error.id, error.code, error.side) == (1, "mismatch", "silo")
    assert "north, south" in error.what
    assert "'west'" in error.what
    assert "--members" in error.hint
    assert worker.read() == []
    assert (desk.load(worker), desk.router.registry.runs) == (0, {})


def test_whether_the_run_is_there_makes_no_difference(desk: Any) -> None:
    desk.worker()
    north, west = desk.silo("north"), desk.silo("west")
    west.says(joining(1, "north", "south"))
    before = west.inbox.pop()
    north.says(joining(1, "north", "south"))
    west.says(joining(1, "north", "south"))
    assert west.inbox.pop().frames() == before.frames()


def test_one_silo_is_in_one_run_of_a_name_at_a_time(desk: Any) -> None:
    worker, north = desk.worker(), desk.silo("north")
    north.says(joining(1, "north", "south"))
    worker.says(Opened(id=1), peer=north.alias)
    north.read()
    north.says(joining(2))
    error = north.reads_error()
    assert (error.code, "other members" in error.what) == ("mismatch", True)
    worker.read()
    north.says(CloseRun(id=3, run="ours"))
    north.says(joining(4))
    assert [header.id for header in worker.read()] == [3, 4]


def test_members_may_have_lost_their_run_and_open_another(desk: Any) -> None:
    worker, north = desk.worker(), desk.silo("north")
    north.says(joining(1, "north", "south"))
    worker.leaves()
    north.read()
    other = desk.worker()
    north.says(joining(2))
    assert [header.id for header in other.read()] == [2]


def test_an_error_says_nothing_of_who_else_is_there(desk: Any) -> None:
    desk.worker()
    west = desk.silo("west")
    west.says(GetAdapter(id=1, run="ours"))
    assert encode_header(west.reads_error()) == encode_header(
        Error(id=1, code="unknown-name", what="you have no session or run 'ours' open", side="silo", hint="")
    )
