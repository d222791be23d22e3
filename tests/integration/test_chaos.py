"""Half a minute of chaos: nothing is lost and nothing is wrong. `make chaos` is the longer one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.timeout(300)
def test_nothing_is_lost_or_wrong_while_processes_die(trunkline: Callable[..., Any], tmp_path: Path) -> None:
    options = ("--minutes", "0.4", "--every", "1.5", "--seed", "3", "--silos", "3", "--json", "chaos.json")
    done = trunkline("bench", "chaos", *options, "--steps", "10", timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 3" in done.stdout
    report = json.loads((tmp_path / "chaos.json").read_text())
    results = report["results"]
    assert (results["lost"], results["wrong"], results["fallen"]) == (0, 0, []), results["first_lost"]
    assert results["kills"] >= 2
    assert results["generations"] >= 20
    assert results["recoveries"] >= 1
    assert results["requests"] == results["generations"] + results["training_steps"]
    assert results["adapter_max_abs_diff"] <= 1e-6
    assert (tmp_path / "chaos.png").read_bytes().startswith(b"\x89PNG")
