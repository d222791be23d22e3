"""What is saved of a run: whole or not at all, the last two of it, and by one home at a time."""

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codec.errors import SaveError, UnavailableError, UsageError
from codec.messages import Committed
from codec.plan import LoraPlan, RunPlan
from workers.place import Bucket, Directory, place_at
from workers.sealed import seal, unseal
from workers.state import Found, RunState, StateStore

TICKET = bytes(range(16))


def state(step: int) -> RunState:
    return RunState(
        run="clinics",
        fingerprint="f00d",
        start=2,
        stop=4,
        plan=RunPlan(silos=2, lora=LoraPlan(rank=2, targets=("q_proj",)), learning_rate=0.1 + 0.2),
        step=step,
        first=b"",
        seats=(b"n" * 16, b"s" * 16),
        last=Committed(step=step - 1, divisor=3.0, clip=1 / 3, grad_norm=0.1) if step else None,
        summed=("a",),
    )


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {
        "value:x": torch.full((3, 2), step / 3),
        "step:x": torch.tensor(float(step)),
        "summed:a": torch.ones(1),
    }


def is_step(found: Found, step: int) -> bool:
    same = all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors(step).items())
    return found.state == state(step) and found.tensors.keys() == tensors(step).keys() and same


@pytest.fixture(params=["directory", "file://", "memory://"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StateStore:
    urls = {
        "directory": str(tmp_path / "deep" / "state"),
        "file://": f"file://{tmp_path}/state",
        "memory://": f"memory:/{tmp_path}/state",
    }
    return StateStore.at(urls[request.param])


def test_the_newest_is_found_and_two_are_kept(store: StateStore) -> None:
    with pytest.raises(UnavailableError, match="no state of the run"):
        store.load(TICKET)
    tenure = store.tenure(TICKET)
    for step in range(4):
        tenure.save(state(step), tensors(step))
        assert is_step(store.load(TICKET), step) or step
        tenure = store.load(TICKET).tenure
    place = store.tenure(TICKET)._place
    assert sum(name.startswith("state-") for name in place.names()) == 2
    with pytest.raises(UnavailableError):
        store.load(bytes(16))
    tenure.discard()
    assert place.names() == []


def test_who_takes_over_fences_the_home_before(store: StateStore) -> None:
    first = store.tenure(TICKET)
    first.save(state(0), tensors(0))
    second = store.load(TICKET).tenure
    with pytest.raises(UnavailableError, match="another worker has taken over run 'clinics'"):
        first.save(state(1), tensors(1))
    second.save(state(1), tensors(1))
    third = store.load(TICKET)
    assert is_step(third, 1)
    for fenced in (first, second):
        with pytest.raises(UnavailableError):
            fenced.save(state(9), tensors(9))
    third.tenure.save(state(2), tensors(2))
    assert is_step(store.load(TICKET), 2), "what a fenced home wrote is not the newest"


@pytest.mark.parametrize("kind", ["directory", "memory", "a filesystem without exclusive creation"])
def test_of_two_who_claim_one_succeeds(tmp_path: Path, kind: str) -> None:
    class Plain(MemoryFileSystem):
        def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
            if mode == "xb":
                raise ValueError("no such mode")
            return super().open(path, mode, **options)

    place = {
        "directory": Directory(tmp_path / "d"),
        "memory": Bucket(fsspec.filesystem("memory"), f"{tmp_path}/m"),
        "a filesystem without exclusive creation": Bucket(Plain(), f"{tmp_path}/p"),
    }[kind]
    assert [place.claim("epoch-1"), place.claim("epoch-1"), place.claim("epoch-2")] == [True, False, True]
    assert place.names() == ["epoch-1", "epoch-2"]


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_of_the_newest_makes_the_one_before_be_used(tmp_path: Path, data: st.DataObject) -> None:
    store = StateStore.at(str(tmp_path / "state"))
    tenure = store.tenure(TICKET)
    tenure._place.clear()
    for step in (1, 2):
        tenure.save(state(step), tensors(step))
    newest = max((tmp_path / "state").rglob("state-*"))
    whole = newest.read_bytes()
    if data.draw(st.booleans(), "cut"):
        newest.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
        newest.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    assert is_step(store.load(TICKET), 1)


def test_without_a_whole_state_it_says_so(store: StateStore) -> None:
    tenure = store.tenure(TICKET)
    tenure.save(state(0), tensors(0))
    for name in tenure._place.names():
        if name.startswith("state-"):
            tenure._place.write(name, b"torn")
    with pytest.raises(SaveError, match=r"no state of the run can be read: .*damaged"):
        store.load(TICKET)


class Full(Directory):
    """A disk on which there is no room."""

    def write(self, name: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    tenure = StateStore(Directory(tmp_path)).tenure(TICKET)
    tenure.save(state(1), tensors(1))
    tenure._place = Full(tenure._place.path)
    with pytest.raises(OSError, match="No space"):
        tenure.save(state(2), tensors(2))
    assert is_step(StateStore(Directory(tmp_path)).load(TICKET), 1)


REALLY_FULL = """
import resource, sys
from pathlib import Path
from workers.place import Directory
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
place = Directory(Path(sys.argv[1]))
place.write("a", b"old")
try:
    place.write("a", bytes(5000))
except OSError as error:
    print(error.strerror, place.read("a"), place.names())
"""


def test_a_write_that_fails_half_way_leaves_the_old_file_alone(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, "-c", REALLY_FULL, str(tmp_path / "d")]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout == "File too large b'old' ['a']\n"


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    place = place_at(str(tmp_path / "s"))
    place.write("a", b"x")
    assert (tmp_path / "s" / "a").stat().st_mode & 0o777 == 0o600


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(UsageError, match="gopher"):
        StateStore.at("gopher://hole")


def test_what_was_sealed_by_another_version_is_told_apart_from_damage() -> None:
    sealed = seal(LoraPlan(), {"a": torch.ones(2)})
    assert unseal(sealed, LoraPlan)[0] == LoraPlan()
    with pytest.raises(SaveError, match="another version"):
        unseal(sealed, RunState)
