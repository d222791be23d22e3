"""`trunkline demo`: the main job, as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest


def descendants(of: int) -> set[int]:
    """Process ids of all children of `of`, and of theirs (Linux)."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, more = set(), {of}
    while more:
        more = {child for child, parent in parents.items() if parent in more} - found
        found |= more
    return found


def alive(pids: set[int]) -> set[int]:
    """Those that still run."""
    return {pid for pid in pids if Path(f"/proc/{pid}").exists()}


def test_demo_with_the_tiny_model(trunkline: Callable[..., object], tmp_path: Path) -> None:
    """Under 30 s, falling loss, adapters written, what crossed the wire on the screen."""
    begun = time.monotonic()
    done = trunkline("demo", "--model", "tiny", "--json", "demo.json")
    seconds = time.monotonic() - begun
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "demo.json").read_text())
    for clinic in ("north", "south"):
        silo = report["results"]["silos"][clinic]
        assert silo["loss_last"] < silo["loss_first"]
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {
            file.name for file in (tmp_path / "demo-out" / clinic).iterdir()
        }
    assert "head → trunk" in done.stdout
    assert "trunk busy" in done.stdout
    assert seconds < 60, "30 s on an idle machine; the suite may share it"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_the_demo_leaves_no_process(tmp_path: Path, number: int) -> None:
    demo = subprocess.Popen(
        [sys.executable, "-m", "trunkline", "demo", "--model", "tiny", "--steps", "100000"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=dict(os.environ),
        # A suite in the background of a shell ignores SIGINT, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        children: set[int] = set()
        deadline = time.monotonic() + 60
        while len(children) < 4 and time.monotonic() < deadline:
            time.sleep(0.2)
            children = descendants(demo.pid)
        assert len(children) >= 4, "broker, worker and two silos"
        time.sleep(3)
        demo.send_signal(number)
        assert demo.wait(30) != 0
        assert not alive(children)
    finally:
        demo.kill()
        demo.wait()
