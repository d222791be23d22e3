"""`trunkline bench`."""

import click


@click.group("bench")
def bench() -> None:
    """Measure."""
