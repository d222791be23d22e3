"""Pictures for people. They need matplotlib (`pip install 'trunkline[plots]'`)."""

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
