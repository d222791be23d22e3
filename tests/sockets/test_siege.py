"""A short run of the siege: hostile peers at real sockets, and an honest silo beside them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MESSAGES = 40_000

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc"),
    pytest.mark.timeout(300),
]


def test_a_short_siege_disturbs_nobody(repository: Path) -> None:
    """All that must hold is checked by the program: its exit code is 1, and it says why, if it does not."""
    program = [sys.executable, str(HERE / "fuzz.py"), "--messages", str(MESSAGES), "--seed", "1"]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(program, capture_output=True, text=True, timeout=270, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert found["seed"] == "1"
    assert int(found["messages"]) >= MESSAGES
    assert int(found["honest.generations"]) >= 3
