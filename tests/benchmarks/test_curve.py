"""`trunkline bench curve` as a command: it ends, and reports what it says it measures."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.commands import bench


def test_it_compares_a_broker_with_keys_and_one_without(tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    options = ["--sizes", "64,4096", "--count", "64", "--rounds", "1", "--window", "4"]
    done = CliRunner().invoke(bench, ["curve", *options, "--json", str(path)])
    assert done.exit_code == 0, done.output
    report = json.loads(path.read_text())
    assert report["bench"] == "curve"
    rows = report["results"]["rows"]
    assert [row["bytes"] for row in rows] == [64, 4096]
    for row in rows:
        assert row["plain_per_s"] > 0
        assert row["curve_per_s"] > 0
        assert row["ratio"] == pytest.approx(row["curve_per_s"] / row["plain_per_s"])
        assert str(row["bytes"]) in done.output
