"""Lists of numbers on a benchmark's command line."""

from codec.errors import UsageError


def numbers(text: str, *, least: float, example: str) -> list[float]:
    """`1,4,16` as numbers of at least `least`. Raises `UsageError`, naming `text` and the `example`."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(least <= number < 1e9 for number in found):
        raise UsageError(f"{text!r} is not a list of numbers", hint=f"Write it as {example}.")
    return found
