"""Pictures for people, beside the JSON for machines. Needs matplotlib (`pip install 'trunkline[plots]'`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codec.errors import UsageError


def rate_distortion(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bits per element against relative error, one panel a boundary.

    Raises `UsageError` if matplotlib is not there.
    """
    plt = _pyplot()
    boundaries = list(dict.fromkeys(row["boundary"] for row in rows))
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for axis, boundary in zip(axes.flat, boundaries, strict=False):
        here = [row for row in rows if row["boundary"] == boundary and row["relative_error"] > 0]
        for family, mark in (("steps", "o-"), ("q", "s-"), ("bf16", "^"), ("fp16", "v")):
            points = sorted((r["bits"], r["relative_error"], r["wire"]) for r in here if _family(r) == family)
            label = "q8 to q4, blocks of 64" if family == "q" else family
            axis.plot([p[0] for p in points], [p[1] for p in points], mark, label=label)
        ideal = sorted((r["entropy"], r["relative_error"]) for r in here if r["entropy"] is not None)
        axis.plot(*zip(*ideal, strict=True), ":", color="grey", label="entropy of the steps' integers")
        axis.set(title=boundary, yscale="log", xlabel="bits per element", ylabel="relative error")
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def check_plots() -> None:
    """Raises `UsageError` if matplotlib is not there: before a long measurement, not after it."""
    _pyplot()


def _family(row: Mapping[str, Any]) -> str:
    wire = str(row["wire"])
    return "q" if wire.startswith("q") else wire


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UsageError(
            "a plot needs matplotlib",
            hint="pip install 'trunkline[plots]', or leave the plot out: --no-plot.",
        ) from None
    matplotlib.use("Agg")  # No window: the picture goes to a file.
    from matplotlib import pyplot

    return pyplot
