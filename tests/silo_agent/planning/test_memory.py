"""Sizes in words, and what systems say of their memory."""

from pathlib import Path

import pytest
import torch

from codec.errors import UsageError
from silo_agent.planning import memory
from silo_agent.planning.memory import free_memory, parse_size, usable_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("8 gb", 8 * 10**9), ("1.5GiB", 3 << 29), ("512MiB", 1 << 29), ("7", 7), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "8XB", "-1GB", "8GBs", "1e9", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 1,000 kB available, in no container."""
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree:  10 kB\nMemAvailable:    1000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def test_a_share_of_what_is_available(system: Path) -> None:
    assert free_memory() == 1_024_000
    assert usable_memory(CPU) == 819_200


@pytest.mark.parametrize(("bound", "usable"), [("max", 819_200), ("1000000", 400_000), ("10", 0)])
def test_a_container_may_have_less(system: Path, bound: str, usable: int) -> None:
    (system / "memory.max").write_text(f"{bound}\n")
    (system / "memory.current").write_text("700000\n")
    (system / "memory.stat").write_text("anon 500000\ninactive_file 200000\n")
    assert usable_memory(CPU) == usable


def test_another_system(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (system / "meminfo").unlink()
    monkeypatch.setattr("os.sysconf", {"SC_AVPHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert free_memory() == 40960

    def unknown(name: str) -> int:
        raise ValueError(f"unrecognized configuration name {name}")

    monkeypatch.setattr("os.sysconf", unknown)
    with pytest.raises(UsageError, match=r"does not say what memory is free \[silo\] Give --memory"):
        free_memory()
