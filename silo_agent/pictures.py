"""Pictures for people. They need matplotlib (`pip install 'trunkline[plots]'`)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codec.errors import UsageError


def pyplot() -> Any:
    """matplotlib's pyplot, which opens no window. Raises `UsageError` if it is not there."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError(
            "a plot needs matplotlib", hint="pip install 'trunkline[plots]', or leave the plot out."
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


@contextlib.contextmanager
def panels(path: Path, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Any]:
    """What `subplots` gives with these `options`, to be drawn on: the picture is then saved at `path`.

    Raises `UsageError` if matplotlib is not there.
    """
    plt = pyplot()
    figure, axes = plt.subplots(rows, columns, layout="constrained", **options)
    yield axes
    figure.savefig(path, dpi=110)
    plt.close(figure)
