"""What a silo keeps of an unfinished run: its own, whole, and gone on with only as it was begun."""

from pathlib import Path

import msgspec
import pytest
import torch

from codec.errors import MismatchError, SaveError
from silo_agent.adapters import check_place
from silo_agent.noise import Moments
from silo_agent.snapshot import FILE, Snapshot, Standing, read_snapshot, remove_snapshot, write_snapshot

SNAPSHOT = Snapshot(
    ticket=bytes(16),
    seat=bytes(range(16)),
    terms={"--batch": "4", "data": "f00d"},
    standing=Standing(3, 17, 1 / 3, Moments(), Moments(10, 0.1, 0.2), bytes(32)),
)
TENSORS = {"value:x": torch.full((2, 3), 1 / 3), "gradient:x": torch.ones(2, 3)}


def test_it_is_read_as_it_was_written_and_for_its_owner_alone(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "out"
    assert read_snapshot(place) is None
    for step in (2, 3):
        standing = msgspec.structs.replace(SNAPSHOT.standing, step=step)
        write_snapshot(place, msgspec.structs.replace(SNAPSHOT, standing=standing), TENSORS)
    found = read_snapshot(place)
    assert found is not None
    assert found[0] == SNAPSHOT
    assert all(torch.equal(found[1][name], tensor) for name, tensor in TENSORS.items())
    assert (place / FILE).stat().st_mode & 0o777 == 0o600
    check_place(place)  # It may become an adapter there.
    remove_snapshot(place)
    assert read_snapshot(place) is None


def test_a_damaged_one_is_told(tmp_path: Path) -> None:
    write_snapshot(tmp_path, SNAPSHOT, TENSORS)
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(SaveError, match=r"unfinished\.run cannot be read: .*damaged"):
        read_snapshot(tmp_path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SaveError, match="unfinished run cannot be saved at"):
        write_snapshot(tmp_path / "file", SNAPSHOT, TENSORS)


@pytest.mark.parametrize(
    "changed", [{"--batch": "2", "data": "f00d"}, {"--batch": "4", "data": "beef"}, {"--batch": "4"}]
)
def test_other_terms_are_refused_by_name(changed: dict[str, str]) -> None:
    SNAPSHOT.check(SNAPSHOT.terms)
    (what,) = [name for name in SNAPSHOT.terms if changed.get(name) != SNAPSHOT.terms[name]]
    with pytest.raises(MismatchError, match=f"begun with another {what}: {SNAPSHOT.terms[what]}, now"):
        SNAPSHOT.check(changed)
