"""Real processes on loopback, all of them ended with the test that started them."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from silo_agent.processes import Processes

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Starts brokers and workers; their logs are in the test's own directory."""
    with Processes(tmp_path / "logs") as started:
        yield started


@pytest.fixture
def trunkline(tmp_path: Path) -> Run:
    """`trunkline("silo", "train", ...)` as a user runs it, in an empty directory."""

    def run(*arguments: str, timeout: float = 90, **options: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "trunkline", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=tmp_path,
            env={**os.environ, "PYTHONWARNINGS": "default"},
            check=False,
            **options,  # type: ignore[call-overload]
        )

    return run


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """A small file of conversations."""
    source = Path(__file__).parents[2] / "silo_agent" / "demo" / "north_clinic.jsonl"
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(source.read_text().splitlines(keepends=True)[:8]))
    return path
