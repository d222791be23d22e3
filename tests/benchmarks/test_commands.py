"""The benchmarks as commands, on the tiny model: they end, and report what they say they measure.

No figure is asserted that depends on the machine.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
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


def invoked(tmp_path: Path, name: str, *options: str) -> tuple[dict[str, Any], str]:
    path = tmp_path / f"{name}.json"
    done = CliRunner().invoke(bench, [name, *options, "--json", str(path)])
    assert done.exit_code == 0, (done.output, done.exception)
    report: dict[str, Any] = json.loads(path.read_text())
    return report, done.output


def children() -> list[str]:
    """The commands of processes that this one started and that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                command = stat.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode()
                found.append(command)
    return [command for command in found if "resource_tracker" not in command]


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


def test_throughput_tells_busy_rate_and_latency_of_a_real_trunk(run: Run) -> None:
    options = ["--silos", "2", "--sequences", "2", "--length", "16", "--accumulate", "2", "--seconds", "0.3"]
    report, printed = run("throughput", *options, "--head", "1", "--tail", "1", "--rounds", "2")
    results = report["results"]
    assert not results["paced"]
    assert 0 < results["trunk_busy"] <= 1
    assert results["tokens_per_s"] > 0
    for found in results["rounds"]:
        rate = found["tokens_per_s"] / found["inprocess_tokens_per_s"]
        assert found["ratio_to_inprocess"] == pytest.approx(rate)
        assert found["seconds"] >= 0.3
    # Four crossings of 64 numbers in under eight bits each, and the headers.
    assert 64 < results["bytes_per_token"] < 4 * 64 * 2
    assert results["latency_ms"].keys() == {"forward", "backward", "commit"}
    assert results["cores"].keys() == {"broker", "worker-0", "replay silos"}
    assert report["path"].with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "trunk busy" in printed
    assert not children()


def test_throughput_of_a_paced_trunk_is_labelled_so(tmp_path: Path) -> None:
    options = ["--pace", "tiny", "--task", "generate", "--mode", "lockstep", "--silos", "2", "--workers", "2"]
    options += ["--head", "1", "--tail", "1", "--length", "6", "--new-tokens", "3", "--seconds", "0.3"]
    report, printed = invoked(tmp_path, "throughput", *options, "--rtt-ms", "4", "--mbit", "50", "--rounds=1")
    results, settings = report["results"], report["settings"]
    assert results["paced"]
    assert "paced, tiny" in printed
    assert (settings["mode"], settings["window"], settings["runs"]) == ("lockstep", 1, 2)
    assert settings["pace_source"]
    assert results["latency_ms"]["extend"]["p50"] >= 4.0  # No answer can be there before its round trip.
    assert results["cores"].keys() == {"broker", "worker-0", "worker-1", "relay", "replay silos"}
    assert not children()


def test_reference_attributes_every_gain(tmp_path: Path) -> None:
    options = ["--pace", "tiny", "--head", "1", "--tail", "1", "--silos", "2", "--sessions", "2"]
    options += ["--length", "8", "--padded-to", "16", "--new-tokens", "2", "--accumulate", "2"]
    report, printed = invoked(tmp_path, "reference", *options, "--rtt-ms", "1", "--seconds", "0.1")
    for task in ("training", "generation"):
        found = report["results"][task]
        assert [row["label"] for row in found["rows"] if row["label"]] == ["R0", "R1"]
        assert found["rows"][0]["gain"] == 1.0
        rates = [row["tokens_per_s"] for row in found["rows"]]
        assert found["times_r0"] == pytest.approx(rates[-1] / rates[0])
    whole, cached = report["results"]["generation"]["rows"][:2]
    # Up a sequence of 16 in fp16 and a mask of 16 by 16, down the sequence; and headers.
    assert 2 * 16 * 16 * 2 + 16 * 16 * 2 < whole["bytes_per_token"] < 2 * (2 * 16 * 16 * 2 + 16 * 16 * 2)
    assert cached["bytes_per_token"] < whole["bytes_per_token"]
    assert "paced, tiny" in printed
    assert not children()


def test_scale_tells_fairness_and_the_brokers_memory(tmp_path: Path) -> None:
    report, printed = invoked(tmp_path, "scale", "--silos", "1,3", "--seconds", "0.5")
    one, three = report["results"]["rows"]
    assert (one["silos"], one["fairness"], three["silos"]) == (1, 1.0, 3)
    assert 1 / 3 <= three["fairness"] <= 1
    for row in (one, three):
        assert row["errors"] == 0
        assert row["tokens_per_s"] > 0
        assert row["broker_bytes"] > 1 << 20
    assert "fairness" in printed
    assert not children()


@pytest.mark.timeout(180)
def test_silos_and_workers_that_come_and_go_leave_nothing_stuck(run: Run) -> None:
    report, printed = run("soak", "--minutes", "0.4", "--silos", "3", "--seed", "1")
    results = report["results"]
    assert (results["errors"], results["stuck"]) == (0, 0), results["first_errors"]
    assert sum(results["done"].values()) >= 10
    assert results["workers_replaced"] >= 1
    # Nothing is bound so early; a worker that grew by a kernel a pass was at twice this.
    assert results["memory"]["worker"]["late_mib"] < 700
    assert results["memory"]["broker"]["late_mib"] < 100
    assert "memory of the broker" in printed
    assert not children()


def test_train_compares_real_silos_with_centralised_training(run: Run) -> None:
    report, printed = run("train", "--silos", "1,2", "--batch", "2", "--steps", "2", "--rounds", "1")
    one, two = report["results"]["rows"]
    assert (one["silos"], two["silos"]) == (1, 2)
    for row in (one, two):
        assert row["ratio"] == pytest.approx(row["tokens_per_s"] / row["central_tokens_per_s"])
        assert 0 < row["trunk_busy"] <= 1
    assert "centralised" in printed
    assert not children()


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
    done = CliRunner().invoke(bench, ["scale", "--silos", "many"])
    assert "'many' is not a list of numbers" in str(done.exception)


def test_settings_that_cannot_be_are_refused() -> None:
    done = CliRunner().invoke(bench, ["throughput", "--silos", "2", "--runs", "3"])
    assert "2 silos cannot be in 3 runs" in str(done.exception)
    done = CliRunner().invoke(bench, ["reference", "--length", "500", "--padded-to", "400"])
    assert "500 tokens do not fit into 400" in str(done.exception)
