"""Throw damaged messages at every decoder, and see each of them read or refused.

A frame is one whole received message. Nothing but a `TrunklineError` may come of it, within --limit
seconds and with memory at most --cap MiB above what it was. Messages are read in processes of their own,
so that a crash is found like any other failure: the message is written to a file, and the exit code is 1.
The closing summary is lines of a key and a value.

\b
Examples:
  python tests/codec/fuzz.py --frames 1000000
  python tests/codec/fuzz.py --seed 7 --only 123456      one message again, and what comes of it
  python tests/codec/fuzz.py --replay fuzz-7-123456.msgpack
"""

import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from fuzzing.pool import Failure, Settings, run
from rich.console import Console
from rich.progress import Progress

_EVERY = 10.0
"""Seconds between two lines of progress where there is no terminal."""


@click.command(help=__doc__)
@click.option("--frames", default=1_000_000, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", type=int, help="Decides every message; drawn if not given, and printed.")
@click.option("--seconds", default=0.0, help="Stop after so long, whatever is left; 0 for never.")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes; one per core if not given.")
@click.option("--cap", default=256, show_default=True, help="MiB by which memory may grow.")
@click.option("--limit", default=5.0, show_default=True, help="Seconds of CPU that a message may take.")
@click.option("--out", default=tempfile.gettempdir(), type=click.Path(path_type=Path), help="For messages.")
@click.option("--only", metavar="INDEX", type=int, help="Read this message of the seed and no other.")
@click.option("--replay", type=click.Path(exists=True, path_type=Path), help="Read the message in a file.")
@click.option("--reader", default="", help="A Python file whose `read` takes the decoders' place.")
def main(
    frames: int,
    seed: int | None,
    seconds: float,
    jobs: int | None,
    cap: int,
    limit: float,
    out: Path,
    only: int | None,
    replay: Path | None,
    reader: str,
) -> None:
    seed = secrets.randbits(32) if seed is None else seed
    print("seed", seed, flush=True)
    if only is not None or replay:
        sys.exit(not _one(seed, only, replay, cap, limit, reader))
    settings = Settings(frames, seed, seconds, jobs or len(os.sched_getaffinity(0)), cap, limit, reader)
    start = time.monotonic()
    with _progress(frames) as tell:
        tally, failure = run(settings, tell)
    took = time.monotonic() - start
    figures = {"cap_mib": str(cap), "seconds": f"{took:.1f}", "per_second": f"{tally.frames / took:.0f}"}
    for key, value in {**tally.lines(), **figures}.items():
        print(key, value)
    if failure:
        sys.exit(_report(failure, seed, out, reader))


def _one(seed: int, only: int | None, file: Path | None, cap: int, limit: float, reader: str) -> bool:
    # Here, since these import torch, and the process that only watches others does without.
    from fuzzing import replay
    from fuzzing.message import Message

    message = Message.unpack(file.read_bytes()) if file else replay.bred(seed, only or 0, reader)
    return replay.replay(message, cap, limit, reader)


def _report(failure: Failure, seed: int, out: Path, reader: str) -> str:
    """What to say of a failure, the message being in a file."""
    if not failure.message:
        return f"failed before the first message: {failure.what}"
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"fuzz-{seed}-{failure.index}.msgpack"
    path.write_bytes(failure.message)
    again = f"python {os.path.relpath(__file__)}" + (f" --reader {reader}" if reader else "")
    return (
        f"{failure.what.rstrip()}\n\nfailed at {failure.index}\nmessage {path}\n"
        f"again {again} --seed {seed} --only {failure.index}\nor {again} --replay {path}"
    )


@contextmanager
def _progress(frames: int) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(*Progress.get_default_columns(), console=console) as bar:
            task = bar.add_task("frames", total=frames)
            yield lambda done: bar.update(task, completed=done)
        return
    said = time.monotonic()

    def tell(done: int) -> None:
        nonlocal said
        if time.monotonic() - said > _EVERY:
            said = time.monotonic()
            print(f"{done} of {frames} frames", file=sys.stderr, flush=True)

    yield tell


if __name__ == "__main__":
    main()
