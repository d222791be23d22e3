"""The benchmarks as commands, on the tiny model: they end, and report what they say they measure.

No figure is asserted that depends on the machine.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner

from benchmarks import timing
from benchmarks.commands import bench
from codec.messages import Wire
from silo_agent.wires import CANDIDATES, Boundary
from workers.catalog import fetch

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run(NAME, *options)`: the report, and what was printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRUNKLINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        model = str(fetch("tiny"))

    def benchmark(name: str, *options: str) -> tuple[dict[str, Any], str]:
        path = tmp_path_factory.mktemp("reports") / f"{name}.json"
        done = CliRunner().invoke(bench, [name, "--model", model, *options, "--json", str(path)])
        assert done.exit_code == 0, done.output
        report = json.loads(path.read_text())
        assert report["bench"] == name
        assert report.keys() == {"bench", "command", "machine", "settings", "results"}
        return report | {"path": path}, done.output

    return benchmark


def test_codec_tells_bits_loss_and_time_of_every_wire_on_every_boundary(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_COPIES", 2)
    monkeypatch.setattr(timing, "_ROUNDS", 2)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Patient {i} is well and goes home on day {i}." for i in range(40)))
    report, printed = run(
        "codec", "--text", str(text), "--tokens", "400", "--draws", "1", "--padded-to", "64"
    )
    results = report["results"]
    assert results["tokens"] >= 400
    rows = {(row["boundary"], row["wire"], row["factor"]): row for row in results["rows"]}
    assert {key[:2] for key in rows} == {(b, w) for b in get_args(Boundary) for w in get_args(Wire)}
    for (boundary, wire, _), row in rows.items():
        assert 0 < row["bits"] <= 33
        assert row["copies"] == pytest.approx((row["encode_ms"] + row["decode_ms"]) / row["memcpy_ms"])
        assert (row["entropy"] is None) == (wire != "steps")
        assert (row["loss_change"] is None) == ("gradient" in boundary)
        if wire in ("raw", "exact"):
            assert row["relative_error"] == 0
            assert row["loss_change"] in (None, pytest.approx(0, abs=1e-6))
    one = results["one_token"]["steps"]
    assert one["bytes"] < results["one_token"]["raw"]["bytes"]
    assert 0 < one["send_us"] <= one["send_p99_us"]
    traffic = results["traffic"]
    assert traffic["padded_fp16_bytes"] == 4 * 2 * 64 * 64 * results["sequences"]
    assert traffic["times_fewer"] == pytest.approx(traffic["padded_fp16_bytes"] / traffic["bytes"], rel=1e-3)
    assert report["path"].with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "times as many" in printed


def test_noise_compares_both_shapes_at_one_distance(run: Run) -> None:
    report, printed = run("noise", "--tokens", "300", "--positions", "4", "--draws", "1")
    rows = report["results"]["rows"]
    for one, channel in zip(rows[::2], rows[1::2], strict=True):
        assert (one["shape"], channel["shape"]) == ("one", "channel")
        assert one["distance"] == channel["distance"]
    distances = report["results"]["distance_at_scale_1"]
    assert rows[1]["scale"] / rows[0]["scale"] == pytest.approx(distances["channel"] / distances["one"])
    assert "loss without noise" in printed


def test_link_times_auto_beside_raw(run: Run) -> None:
    report, _ = run("link", "--tokens", "64", "--mbit", "50,0", "--rtt-ms", "0", "--rounds", "1")
    rows = report["results"]["rows"]
    assert [row["mbit"] for row in rows] == [50, 0]
    for row in rows:
        for what, boundaries in (("train", 4), ("decode", 2)):
            assert row[what]["raw_ms"] > 0
            assert row[what]["auto_ms"] > 0
            assert len(row[what]["picks"]) == boundaries
            assert set(row[what]["picks"]) <= set(CANDIDATES)


def test_broker_is_measured_beside_a_proxy(tmp_path: Path) -> None:
    path = tmp_path / "broker.json"
    options = ["--sizes", "1024,4096", "--count", "64", "--window", "8", "--rounds", "1"]
    done = CliRunner().invoke(bench, ["broker", *options, "--json", str(path)])
    assert done.exit_code == 0, done.output
    rows = json.loads(path.read_text())["results"]["rows"]
    assert [row["bytes"] for row in rows] == [1024, 4096]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["broker_per_s"] / row["proxy_per_s"])


def test_decode_counts_tokens_of_many_sessions(run: Run) -> None:
    report, printed = run("decode", "--sessions", "1,3", "--context", "4", "--tokens", "4", "--rounds", "1")
    one, three = report["results"]["rows"]
    assert (one["sessions"], one["scaling"], three["sessions"]) == (1, 1.0, 3)
    assert three["scaling"] == pytest.approx(three["tokens_per_s"] / one["tokens_per_s"])
    assert report["results"]["ratio_to_transformers"] > 0
    assert "times transformers'" in printed


def test_a_plot_without_matplotlib_says_so_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = CliRunner().invoke(
        bench, ["codec", "--model", "no-such-model", "--json", str(tmp_path / "a.json")]
    )
    assert "matplotlib" in str(done.exception)
    assert "trunkline[plots]" in str(done.exception)


def test_rates_that_are_none_are_refused_by_name() -> None:
    done = CliRunner().invoke(bench, ["link", "--mbit", "fast"])
    assert "'fast' is not a list of numbers" in str(done.exception)
    done = CliRunner().invoke(bench, ["decode", "--sessions", "1,0"])
    assert "'1,0' is not a list of numbers" in str(done.exception)
    done = CliRunner().invoke(bench, ["broker", "--sizes", "big"])
    assert "'big' is not a list of numbers" in str(done.exception)
