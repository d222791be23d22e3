"""`silo plan` without a broker, and `--partition auto` where memory is short."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from codec.errors import LimitError, UsageError
from silo_agent.commands import silo
from silo_agent.planning import measuring

pytestmark = pytest.mark.usefixtures("own_log")


def plan(tiny: Any, data: Path, *arguments: object) -> Result:
    words = ["plan", "--model", tiny.path, "--device", "cpu", "--data", data, *arguments]
    return CliRunner().invoke(silo, [str(word) for word in words], catch_exceptions=False)


@pytest.mark.parametrize("purpose", ["train", "generate"])
def test_a_proposal_is_told_and_written(tiny: Any, clinics: list[Path], tmp_path: Path, purpose: str) -> None:
    report = tmp_path / "plan.json"
    done = plan(tiny, clinics[0], "--for", purpose, "--noise", 0.05, "--memory", "1GB", "--json", report)
    assert done.exit_code == 0
    written = json.loads(report.read_text())
    assert (written["bench"], written["settings"]["purpose"]) == ("silo-plan", purpose)
    results = written["results"]
    assert results["partition"] == {"head": 2, "tail": 2}
    assert results["binding"] == "wish"
    assert results["line"] is None
    assert len(results["wires"]) == (4 if purpose == "train" else 2)
    for word in ("--head 2 --tail 2", "--noise 0.05", "--wire auto", "no --broker"):
        assert word in done.stdout
    sizes = [crossing["bytes"] for crossing in results["crossings"].values()]
    assert sizes == sorted(sizes, reverse=True)


def test_short_memory_is_what_decides(tiny: Any, clinics: list[Path], tmp_path: Path) -> None:
    report = tmp_path / "plan.json"
    plan(tiny, clinics[0], "--json", report)
    needed = {
        (one["partition"]["head"], one["partition"]["tail"]): one["memory"]
        for one in json.loads(report.read_text())["results"]["compared"]
    }
    done = plan(tiny, clinics[0], "--memory", needed[2, 2] - 1, "--json", report)
    results = json.loads(report.read_text())["results"]
    assert results["binding"] == "memory"
    assert sum(results["partition"].values()) == 3
    assert "memory: 2, 2 would take" in done.stdout
    with pytest.raises(LimitError, match="for a partition of 1, 1"):
        plan(tiny, clinics[0], "--memory", needed[1, 1] - 1)


def test_auto_looks_at_one_machine_alone(tiny: Any, clinics: list[Path], tmp_path: Path) -> None:
    words = ["train", "--broker", "tcp://127.0.0.1:1", "--model", tiny.path, "--data", clinics[0]]
    words += ["--out", tmp_path / "out", "--partition", "auto", "--silos", 2]
    with pytest.raises(UsageError, match="all 2 silos of a run keep the same blocks"):
        CliRunner().invoke(silo, [str(word) for word in words], catch_exceptions=False)


def test_auto_says_what_it_picked_before_anything_is_sent(
    tiny: Any, clinics: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "usable_memory", lambda device: 1000)
    words = ["train", "--broker", "tcp://127.0.0.1:1", "--model", tiny.path, "--data", clinics[0]]
    words += ["--out", tmp_path / "out", "--partition", "auto"]
    with pytest.raises(LimitError, match=r"0\.001 MB may be taken"):
        CliRunner().invoke(silo, [str(word) for word in words], catch_exceptions=False)
