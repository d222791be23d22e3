"""Pictures for people, beside the JSON for machines. Needs matplotlib (`pip install 'trunkline[plots]'`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from silo_agent.pictures import panels, pyplot


def rate_distortion(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bits per element against relative error, one panel a boundary.

    Raises `UsageError` if matplotlib is not there.
    """
    boundaries = list(dict.fromkeys(row["boundary"] for row in rows))
    with panels(path, 2, 2, figsize=(11, 8)) as axes:
        for axis, boundary in zip(axes.flat, boundaries, strict=False):
            here = [row for row in rows if row["boundary"] == boundary and row["relative_error"] > 0]
            for family, mark in (("steps", "o-"), ("q", "s-"), ("bf16", "^"), ("fp16", "v")):
                points = sorted(
                    (r["bits"], r["relative_error"], r["wire"]) for r in here if _family(r) == family
                )
                label = "q8 to q4, blocks of 64" if family == "q" else family
                axis.plot([p[0] for p in points], [p[1] for p in points], mark, label=label)
            ideal = sorted((r["entropy"], r["relative_error"]) for r in here if r["entropy"] is not None)
            axis.plot(*zip(*ideal, strict=True), ":", color="grey", label="entropy of the steps' integers")
            axis.set(title=boundary, yscale="log", xlabel="bits per element", ylabel="relative error")
            axis.grid(alpha=0.3)
        axes.flat[0].legend()


def busy_timeline(slices: Sequence[Sequence[float]], label: str, path: Path) -> None:
    """The share of each slice `[second, share]` in which the trunk computed."""
    with panels(path, figsize=(9, 3.5)) as axis:
        axis.step(*zip(*slices, strict=True), where="post")
        axis.set(title=f"trunk busy, {label}", xlabel="seconds", ylabel="share of time", ylim=(0, 1.05))
        axis.grid(alpha=0.3)


def ladder(rows: Mapping[str, Sequence[Mapping[str, Any]]], label: str, path: Path) -> None:
    """Tokens per second of each way of working, one panel a task, on a logarithmic scale."""
    with panels(path, 1, len(rows), figsize=(6.5 * len(rows), 4), squeeze=False) as axes:
        for axis, (task, ways) in zip(axes.flat, rows.items(), strict=True):
            names = [way["name"] for way in ways]
            rates = [way["tokens_per_s"] for way in ways]
            bars = axis.barh(names, rates)
            axis.bar_label(
                bars, [f"{rate:,.0f}" if rate > 100 else f"{rate:.3g}" for rate in rates], padding=3
            )
            axis.invert_yaxis()
            axis.set(title=f"{task}, {label}", xscale="log", xlabel="tokens per second")
            axis.set_xlim(min(rates) / 2, max(rates) * 5)
            axis.xaxis.set_minor_formatter("")


def lines(
    rows: Sequence[Mapping[str, Any]], x: str, names: Mapping[str, str], path: Path, *, scale: str = "log"
) -> None:
    """One panel for each of `names`, keys of the rows with what to call them, over `x`."""
    with panels(path, 1, len(names), figsize=(4.5 * len(names), 3.5)) as axes:
        for axis, (name, title) in zip(axes.flat, names.items(), strict=True):
            axis.plot([row[x] for row in rows], [row[name] for row in rows], "o-" if scale == "log" else "-")
            axis.set(title=title, xlabel=x, xscale=scale, ylim=(0, None))
            axis.grid(alpha=0.3)


def chaos_timeline(timeline: Mapping[str, Sequence[Any]], path: Path) -> None:
    """Tokens and training steps in each half second, what happened meanwhile, and how long each recovery
    took: `tokens` and `steps` are moments, `deeds` are `[begun, ended, label]`, `recoveries` are
    `[at, seconds, label]`."""
    with panels(path, 2, 1, figsize=(13, 7), sharex=True) as (above, below):
        labels = sorted({deed[2] for deed in timeline["deeds"]})
        colours = {label: f"C{number}" for number, label in enumerate(labels)}
        last = max((*timeline["tokens"], *timeline["steps"], 1.0))
        halves = [0.5 * half for half in range(int(2 * last) + 2)]
        above.hist(timeline["tokens"], bins=halves, histtype="step", color="black", label="tokens")
        above.hist(timeline["steps"], bins=halves, histtype="step", color="grey", label="training steps")
        for begun, ended, label in timeline["deeds"]:
            above.axvspan(begun, max(ended, begun + 0.05), color=colours[label], alpha=0.35, linewidth=0)
        above.set(ylabel="in half a second", title="progress, and what disturbed it")
        above.legend(loc="upper right")
        for label in labels:
            points = [(at, seconds) for at, seconds, of in timeline["recoveries"] if of == label]
            below.plot(
                *zip(*points, strict=True) if points else ([], []), "o", color=colours[label], label=label
            )
        below.set(xlabel="seconds", ylabel="seconds to go on", ylim=(0, None))
        below.legend(ncols=4, fontsize="small")
        below.grid(alpha=0.3)


def picture_beside(report: Path | None, wanted: bool) -> Path | None:
    """Where the plot of a `report` goes, if it is wanted and there is a report.

    Raises `UsageError` if matplotlib is not there: before a long measurement, not after it.
    """
    if report is None or not wanted:
        return None
    pyplot()
    return report.with_suffix(".png")


def _family(row: Mapping[str, Any]) -> str:
    wire = str(row["wire"])
    return "q" if wire.startswith("q") else wire
