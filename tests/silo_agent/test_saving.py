"""Saving an adapter fails cleanly: a clear error, nothing half-written, the old one intact."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from codec.errors import SaveError
from codec.plan import LoraPlan
from silo_agent.adapters import check_place, read_adapter, write_adapter
from silo_agent.report import write_report

PLAN = LoraPlan(rank=2, targets=("q_proj",))
FILES = ["adapter_config.json", "adapter_model.safetensors"]


def save(place: Path, value: float, blocks: int = 2) -> None:
    tensors = {
        f"model.layers.{i}.self_attn.q_proj.lora_A.weight": torch.full((2, 8), value) for i in range(blocks)
    }
    write_adapter(place, PLAN, tensors, "base")


def value_in(place: Path) -> float:
    return float(next(iter(read_adapter(place).tensors.values()))[0, 0])


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


@contextmanager
def nobody() -> Iterator[None]:
    """Root may write everywhere: be somebody else for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        save(tmp_path / "deep" / "er", 1.0)
    finally:
        os.umask(before)
    assert names(tmp_path / "deep" / "er") == FILES
    for name in FILES:
        assert (tmp_path / "deep" / "er" / name).stat().st_mode & 0o777 == 0o644


def test_an_adapter_is_replaced_and_what_else_is_there_stays(tmp_path: Path) -> None:
    save(tmp_path / "a", 1.0)
    (tmp_path / "a" / "README.md").write_text("mine")
    save(tmp_path / "a", 2.0, blocks=3)
    assert value_in(tmp_path / "a") == 2.0
    assert names(tmp_path / "a") == ["README.md", *FILES]
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["empty", "symlink", "a killed save's", "here"])
def test_directories_that_may_be_filled(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, real = tmp_path / "a", tmp_path / "real"
    if kind == "symlink":
        real.mkdir()
        place.symlink_to(real)
    else:
        place.mkdir()
    if kind == "a killed save's":
        (place / ".saving-x1").mkdir()
    if kind == "here":
        monkeypatch.chdir(place)
        save(Path(), 1.0)
    else:
        save(place, 1.0)
    assert value_in(place) == 1.0
    assert place.is_symlink() == (kind == "symlink")


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(SaveError, match="holds something other than an adapter") as caught:
        save(tmp_path, 1.0)
    assert names(tmp_path) == ["notes.txt"]
    assert "--out" in caught.value.hint


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("precious")
    for place in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(SaveError, match="cannot be saved"):
            save(place, 1.0)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "precious"


def test_a_place_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a", 1.0)
    for place in (tmp_path, tmp_path / "a"):
        place.chmod(0o555)
    monkeypatch.chdir(tmp_path)  # The directories above belong to this user alone.
    try:
        with nobody():
            for name in ("a", "b", "b/c"):
                with pytest.raises(SaveError, match=f"cannot be saved at {name}: .*Permission denied"):
                    save(Path(name), 2.0)
    finally:
        for place in (tmp_path, tmp_path / "a"):
            place.chmod(0o755)
    assert value_in(tmp_path / "a") == 1.0
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == FILES


def test_a_place_that_may_not_even_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir(mode=0o700)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "closed").chmod(0o000)
    try:
        with nobody(), pytest.raises(SaveError, match="Permission denied"):
            save(Path("closed/a"), 1.0)
    finally:
        (tmp_path / "closed").chmod(0o755)


DISK_FULL = """
import resource, sys, torch
from pathlib import Path
from codec.errors import SaveError
from codec.plan import LoraPlan
from silo_agent.adapters import write_adapter
tensors = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(8, 4096)}
for room in (20_000, 600):  # Not enough for the weights; not even for their header.
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    for place in sys.argv[1:]:
        try:
            write_adapter(Path(place), LoraPlan(rank=2, targets=("q_proj",)), tensors, "base")
        except SaveError as error:
            print(error)
"""


def test_a_full_disk_leaves_the_old_adapter_and_nothing_new(tmp_path: Path, repository: Path) -> None:
    save(tmp_path / "old", 1.0)
    places = [str(tmp_path / "old"), str(tmp_path / "new")]
    command = [sys.executable, "-W", "error", "-c", DISK_FULL, *places]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line, place in zip(lines, places * 2, strict=True):
        assert line.startswith(f"the adapter cannot be saved at {place}: ")
        assert "File too large" in line
        assert "[silo] Free some space" in line
    assert value_in(tmp_path / "old") == 1.0
    assert names(tmp_path / "old") == FILES
    assert names(tmp_path) == ["old"]


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_report(None, "bench", {}, {})
    path = tmp_path / "deep" / "r.json"
    write_report(path, "bench", {"noise": 0.1}, {"loss": 1.5})
    assert path.stat().st_mode & 0o777 == 0o644
    assert '"loss": 1.5' in path.read_text()
    (tmp_path / "taken").mkdir()
    for bad in (tmp_path / "taken", path / "below"):
        with pytest.raises(SaveError, match="cannot be written"):
            write_report(bad, "bench", {}, {})
    assert names(tmp_path) == ["deep", "taken"]
    assert names(tmp_path / "deep") == ["r.json"]


def test_a_bad_place_is_refused_before_training(tmp_path: Path) -> None:
    """The same refusals as after it, without the hours between; a good place stays untouched."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    for place in ("file", "file/below", "other"):
        with pytest.raises(SaveError, match="cannot be saved"):
            check_place(tmp_path / place)
    check_place(tmp_path / "new" / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]
