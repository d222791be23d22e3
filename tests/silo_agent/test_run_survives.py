"""Runs whose worker is lost, forgets, repeats or mixes up: the adapters are the undisturbed ones."""

import random
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest
from torch import Tensor

from broker.parcel import Parcel
from codec.errors import EndedError, UnavailableError
from codec.messages import Backward, CloseRun, Commit, Committed, Forward, OpenRun
from codec.plan import RunPlan
from silo_agent.microbatch import MicroBatch
from silo_agent.noise import Noise, NoiseScale
from silo_agent.remote_run import RemoteRun
from silo_agent.snapshot import Snapshot, read_snapshot, write_snapshot
from silo_agent.trainer import Trainer
from workers.state import StateStore

# With the usual eps AdamW blows up the rounding of gradients near zero; it depends on what shared a pass.
PLAN = RunPlan(silos=2, steps=3, learning_rate=1e-3, clip_norm=0.1, eps=1e-5)
SHARED = RunPlan(silos=2, steps=3, learning_rate=1e-3, clip_norm=0.1, eps=1e-5, ends="shared")
NAMES = ("north", "south")
Batches = list[list[MicroBatch]]


class Member:
    """One silo of a run, in a thread of the test's; it can die and come back from what it kept."""

    def __init__(self, pool: Any, name: str, steps: Batches, place: Path, plan: RunPlan, **more: Any) -> None:
        self.name, self._pool, self._steps, self._place, self._plan = name, pool, steps, place / name, plan
        self._more = {"wait": 20.0, "patience": 30.0, "deadline": 30.0, "noise": 0.0, "source": None, **more}
        self.ends = pool.ends(*self._more.pop("cut", (2, 2)))
        self.before_step: Callable[[int], None] = lambda step: None

    def noises(self, relative: float) -> None:
        """With noise of its own, as a silo's is."""
        self._more["source"] = Noise(NoiseScale(relative=relative))

    def train(self) -> dict[str, Tensor]:
        """To the run's end; all of the adapter. Goes on with what is kept if something is."""
        plan, ends, pool, more = self._plan, self.ends, self._pool, self._more
        if not ends.adapter_key:
            ends.adapt(plan.lora, plan.seed)
        span = {"start": ends.trunk.start, "stop": ends.trunk.stop}
        opening = OpenRun(run="run", model=ends.card, plan=plan, **span)
        remote = pool.remote(deadline=more["deadline"], name=self.name)
        kept = read_snapshot(self._place)
        if kept:
            opening = OpenRun(
                run="run", model=ends.card, plan=plan, ticket=kept[0].ticket, seat=kept[0].seat, **span
            )
        run = RemoteRun(remote, opening, [], wait=more["wait"])
        home = run.open()

        def keep(standing: Any, tensors: Any) -> None:
            snapshot = Snapshot(run.opening.ticket, run.opening.seat, {}, standing)
            write_snapshot(self._place, snapshot, tensors)

        trainer = Trainer(
            ends,
            remote,
            run="run",
            plan=plan,
            noise=more["source"] or seeded(more["noise"], NAMES.index(self.name)),
            patience=more["patience"],
            rejoin=run.rejoin if run.survives else None,
            keep=keep,
        )
        if kept:
            trainer.stand(kept[0].standing, kept[1])
            trainer.settle(home)
        try:
            while (number := trainer.step_number) < plan.steps:
                self.before_step(number)
                trainer.step(self._steps[number], (*self._steps, [])[number + 1])
            found = {name: tensor.detach().clone() for name, tensor in ends.adapter().items()}
            found |= run.adapter()
            run.close()
        finally:
            remote.close()
        return found


def seeded(relative: float, seed: int) -> Noise:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Noise(NoiseScale(relative=relative), seed=seed)


@pytest.fixture(scope="module")
def steps(random_batches: Any) -> dict[str, Batches]:
    return {
        name: [random_batches(3, 10 * step + place) for step in range(PLAN.steps)]
        for place, name in enumerate(NAMES)
    }


@pytest.fixture
def members(steps: Any, tmp_path: Path) -> Callable[..., list[Member]]:
    def make(pool: Any, plan: RunPlan = PLAN, **more: Any) -> list[Member]:
        return [Member(pool, name, steps[name], tmp_path, plan, **more) for name in NAMES[: plan.silos]]

    return make


def together(members: list[Member]) -> list[dict[str, Tensor]]:
    with ThreadPoolExecutor(len(members)) as threads:
        return [done.result(90) for done in [threads.submit(member.train) for member in members]]


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    return StateStore.at(str(tmp_path / "state"))


@pytest.fixture(scope="module")
def learned() -> dict[object, list[dict[str, Tensor]]]:
    return {}


@pytest.fixture
def undisturbed(new_pool: Any, members: Any, learned: Any) -> Callable[..., list[dict[str, Tensor]]]:
    """What two silos learn with a worker that saves nothing; test_training_exact compares it with PEFT."""

    def train(plan: RunPlan = PLAN, **more: Any) -> list[dict[str, Tensor]]:
        key = (plan.silos, plan.ends, *more.values())
        if key not in learned:
            with new_pool() as pool:
                pool.start_worker()
                learned[key] = together(members(pool, plan, **more))
        return learned[key]

    return train


def assert_equal(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-6
        assert max(float(tensor.abs().max()) for name, tensor in theirs.items() if "lora_B" in name) > 1e-3


def nothing_left(tmp_path: Path) -> bool:
    """The worker removes the state of a run that is over in its own time."""
    until = time.monotonic() + 10
    while any(path.is_file() for path in (tmp_path / "state").rglob("*")) and time.monotonic() < until:
        time.sleep(0.05)
    return not list((tmp_path / "state").glob("*"))


def dies(kind: type, number: int) -> Callable[[Parcel], list[Parcel] | None]:
    """A worker that leaves with its `number`th message of a kind in its hands."""
    seen = count(1)

    def mood(parcel: Parcel) -> None:
        if isinstance(parcel.header, kind) and next(seen) == number:
            raise EOFError

    return mood


def mute(number: int) -> Callable[[Parcel], list[Parcel]]:
    """A worker that takes the step and saves it, and leaves before its `number`th answer to a commit."""
    seen = count(1)

    def told(answer: Parcel) -> list[Parcel]:
        if isinstance(answer.header, Committed) and next(seen) == number:
            raise EOFError
        return [answer]

    return told


DEATHS = [(Forward, 2), (Backward, 8), (Commit, 1), (Commit, 4), (Committed, 1), (Committed, 3)]


@pytest.mark.parametrize(
    ("plan", "kind", "number"),
    [*((PLAN, *death) for death in DEATHS), *((SHARED, *death) for death in DEATHS[3:5])],
)
def test_the_worker_dies(
    bare_pool: Any,
    members: Any,
    store: Any,
    undisturbed: Any,
    tmp_path: Path,
    plan: RunPlan,
    kind: type,
    number: int,
) -> None:
    expected = undisturbed(plan)
    if kind is Committed:
        bare_pool.start_moody_worker(lambda parcel: None, store, mute(number))
    else:
        bare_pool.start_moody_worker(dies(kind, number), store)
    bare_pool.start_worker(store=store)
    assert_equal(together(members(bare_pool, plan)), expected)
    assert nothing_left(tmp_path)


def test_messages_come_twice_and_late_and_out_of_order(
    bare_pool: Any, members: Any, store: Any, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request comes twice, some of it again much later; answers are mixed up, or come too late."""
    expected, dice, handle = undisturbed(), random.Random(3), bare_pool._handle
    seen: list[Parcel] = []
    held: list[Parcel] = []
    holds = iter(range(2))

    def twice(service: Any, parcels: list[Parcel]) -> list[Parcel]:
        (parcel,) = parcels
        if isinstance(parcel.header, Forward | Backward | Commit):
            parcels = [parcel, parcel, *(dice.choice(seen) for _ in range(2) if seen)]
            seen.append(parcel)
        again = handle(service, parcels)
        answers = list({(a.peer, a.header.id): a for a in reversed(again)}.values())
        dice.shuffle(answers)
        if isinstance(parcel.header, Forward) and dice.random() < 0.3 and next(holds, None) is not None:
            held.extend(answers)
            return []
        answers += held
        held.clear()
        return answers + again

    monkeypatch.setattr(bare_pool, "_handle", twice)
    bare_pool.start_moody_worker(lambda parcel: None, store)
    assert_equal(together(members(bare_pool, deadline=4.0)), expected)
    assert next(holds, None) is None, "answers were held back"


def test_answers_to_commits_are_lost(bare_pool: Any, members: Any, store: Any, undisturbed: Any) -> None:
    """One silo alone: another would wait as long as this one, and be done with waiting as soon."""
    alone, seen = msgspec.structs.replace(PLAN, silos=1), count(1)
    expected = undisturbed(alone)

    def told(answer: Parcel) -> list[Parcel]:
        return [] if isinstance(answer.header, Committed) and next(seen) in (1, 3) else [answer]

    bare_pool.start_moody_worker(lambda parcel: None, store, told)
    assert_equal(together(members(bare_pool, alone, patience=2.0)), expected)
    assert next(seen) == PLAN.steps + 2 + 1


class KilledError(Exception):
    pass


@pytest.mark.parametrize("when", ["between two steps", "in a step", "before its commit", "after its commit"])
def test_a_silo_dies_and_comes_back(
    bare_pool: Any, members: Any, store: Any, undisturbed: Any, steps: Any, tmp_path: Path, when: str
) -> None:
    """Its link is gone at once; a new process with the same snapshot goes on as another silo."""
    expected = undisturbed()
    bare_pool.start_worker(store=store)
    north, south = members(bare_pool)
    remote, make = [], bare_pool.remote
    south._pool = type("", (), {"remote": lambda self, **o: remote.append(make(**o)) or remote[-1]})()

    def kill(step: int) -> None:
        if step == 1:
            south.before_step = lambda step: None
            if when == "between two steps":
                raise KilledError
            begun, real, send = count(1), remote[-1].wait, remote[-1].send

            def sends(packed: Any, **options: Any) -> int:
                if when == "in a step" and isinstance(packed.request, Backward) and next(begun) == 2:
                    raise KilledError
                if when == "before its commit" and isinstance(packed.request, Commit):
                    raise KilledError
                return send(packed, **options)

            def waits(number: int) -> Any:
                arrival = real(number)
                if when == "after its commit" and isinstance(arrival.header, Committed):
                    raise KilledError
                return arrival

            remote[-1].send, remote[-1].wait = sends, waits

    south.before_step = kill
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(north.train)
        with pytest.raises(KilledError):
            south.train()
        again = Member(bare_pool, "south", steps["south"], tmp_path, PLAN)
        second = again.train()
        found = [first.result(90), second]
    assert_equal(found, expected)


@pytest.mark.parametrize("cut", [(2, 2), (0, 2)], ids=["the head learns", "the head does not learn"])
def test_a_step_done_again_sends_the_same_bytes(
    bare_pool: Any, members: Any, store: Any, cut: tuple[int, int]
) -> None:
    """New noise on the same hidden states would average out."""
    bare_pool.start_moody_worker(dies(Backward, 10), store)
    bare_pool.start_worker(store=store)
    north, south = members(bare_pool, cut=cut)
    for member in (north, south):
        member.noises(0.1)
    together([north, south])
    sent = [tuple(bytes(frame) for frame in parcel.tensors) for parcel in bare_pool.sent(Forward)]
    assert len(sent) > 2 * PLAN.steps * 3, "nothing was done again"
    assert len(set(sent)) == 2 * PLAN.steps * 3, "a step that is done again has no bytes of its own"


def test_a_damaged_last_state_takes_everybody_one_step_back(
    bare_pool: Any, members: Any, store: Any, undisturbed: Any, tmp_path: Path
) -> None:
    """The worker is lost after a step that both have applied, and what it saved of it is torn."""
    expected, answered = undisturbed(), count(1)

    def damage(parcel: Parcel) -> None:
        if isinstance(parcel.header, Forward) and next(answered) == 9:
            newest = max((tmp_path / "state").rglob("state-*"))
            newest.write_bytes(newest.read_bytes()[:-100])
            raise EOFError

    bare_pool.start_moody_worker(damage, store)
    bare_pool.start_worker(store=store)
    assert_equal(together(members(bare_pool)), expected)


def test_a_silo_that_leaves_on_purpose_ends_the_run(
    bare_pool: Any, members: Any, store: Any, tmp_path: Path
) -> None:
    bare_pool.start_worker(store=store)
    north, south = members(bare_pool)

    def leave(step: int) -> None:
        if step == 1:
            kept = read_snapshot(tmp_path / "south")
            assert kept is not None
            span = {"start": south.ends.trunk.start, "stop": south.ends.trunk.stop}
            seat = {"ticket": kept[0].ticket, "seat": kept[0].seat}
            remote = bare_pool.remote(name="south again")
            remote.call(OpenRun(run="run", model=south.ends.card, plan=PLAN, **span, **seat))
            remote.call(CloseRun(run="run"))
            raise KilledError

    south.before_step = leave
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(north.train)
        with pytest.raises(KilledError):
            south.train()
        with pytest.raises(EndedError, match="left the run at step 1"):
            first.result(60)
    assert nothing_left(tmp_path)


def test_without_a_state_a_loss_is_the_end(bare_pool: Any, members: Any) -> None:
    bare_pool.start_moody_worker(dies(Backward, 2))
    bare_pool.start_worker()
    with pytest.raises(UnavailableError, match="left"):
        together(members(bare_pool, wait=2.0))
