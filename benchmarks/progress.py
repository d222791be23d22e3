"""How a benchmark says what it is at."""

from collections.abc import Callable

Progress = Callable[[str], None]
