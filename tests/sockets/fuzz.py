"""Besiege a real broker, its worker and a silo's link with hostile peers, beside an honest silo.

Hostile silos, a hostile worker, a hostile broker and raw TCP connections throw --messages messages in
all: right ones, and the same mutated, truncated, replayed, of wrong kinds, numbers and sizes, as floods.
Meanwhile an honest silo generates through the same broker and worker. At the end: nothing crashed or
hung, every honest token was right, no process grew by more than --cap MiB, no error came up that nobody
foresaw, and every reaction that shows that messages reach deep occurred. The closing summary is lines of
a key and a value.

\b
Examples:
  python tests/sockets/fuzz.py --messages 1000000
  python tests/sockets/fuzz.py --seed 7 --first 12 --messages 2000      round 12 of that seed
"""

import secrets
import sys
import tempfile
import threading
import time
from pathlib import Path
from random import Random
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "codec"), str(ROOT / "tests" / "sockets")]

import click  # noqa: E402
from siege import hostile_silo, hostile_worker  # noqa: E402
from siege.arsenal import Tensors  # noqa: E402
from siege.honest import Honest  # noqa: E402
from siege.impostor import Impostor  # noqa: E402
from siege.peer import Hang  # noqa: E402
from siege.place import Place, watch  # noqa: E402
from siege.tally import Tally  # noqa: E402
from siege.wire import Wire  # noqa: E402

from workers import catalog  # noqa: E402

ROUND = 2000
"""Messages that are decided by the seed and one number."""
_EVERY = 10.0


class Siege:
    """One run: what is besieged, by whom, and what came of it."""

    def __init__(self, seed: int, logs: Path) -> None:
        self._seed = seed
        self.tally = Tally()
        self._model = str(catalog.fetch("tiny"))
        self._impostor = Impostor(self.tally)
        self.place = Place(logs, self._impostor.endpoint)
        self._wire = Wire(self.place.endpoint, self.tally)
        self.honest = Honest(self.place.endpoint, self._model)
        self._tensors = Tensors(self.honest.card.hidden)

    def begin(self) -> None:
        """Wait until honest work is done, and everything is as large as it gets without hostility."""
        self.honest.start()
        until = time.monotonic() + 60
        while not self.honest.generated:
            if self.honest.error or time.monotonic() > until:
                raise Hang(f"no honest work: {self.honest.error}")
            time.sleep(0.05)

    def play(self, number: int, messages: int) -> None:
        """Round `number`. Raises `Hang` where somebody does not answer."""
        rng = Random(f"{self._seed}/{number}")
        endpoint, tally, card = self.place.endpoint, self.tally, self.honest.card
        share = messages // 10
        for _ in range(2):
            hostile_silo.play(rng, endpoint, tally, card, self._tensors, ["north", "run"], 3 * share)
        hostile_worker.play(rng, endpoint, tally, self._tensors, [self.honest.alias], share)
        self._impostor.play(rng, card, self._tensors, 3 * share - share // 8)
        self._wire.play(rng, share // 8)

    def end(self) -> None:
        """End the hostile ones, and the honest silo after a last generation. Raises what that met."""
        self._wire.close()
        done = self.honest.generated
        until = time.monotonic() + 30
        while self.honest.generated < done + 2 and not self.honest.error and time.monotonic() < until:
            time.sleep(0.05)
        self.honest.stop()

    def close(self) -> None:
        """End everything."""
        self._impostor.close()
        self.place.close()


@click.command(help=__doc__)
@click.option("--messages", default=1_000_000, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", type=int, help="Decides what is thrown; drawn if not given, and printed.")
@click.option("--first", default=0, help="The round to begin with.")
@click.option("--seconds", default=0.0, help="Stop after so long, whatever is left; 0 for never.")
@click.option("--cap", default=256, show_default=True, help="MiB by which each process may grow.")
def main(messages: int, seed: int | None, first: int, seconds: float, cap: int) -> None:
    seed = secrets.randbits(32) if seed is None else seed
    print("seed", seed, flush=True)
    with tempfile.TemporaryDirectory() as logs:
        faults = _run(Siege(seed, Path(logs)), messages, first, seconds, cap)
    if faults:
        sys.exit("\n".join([*faults[:20], f"again: --seed {seed}"]))


def _run(siege: Siege, messages: int, first: int, seconds: float, cap: int) -> list[str]:
    """What went wrong."""
    faults, peaks, ended = [], dict[str, float](), threading.Event()
    begun = said = time.monotonic()
    number = first
    try:
        siege.begin()
        siege.place.settle()
        begun = said = time.monotonic()
        threading.Thread(target=watch, args=(siege.place, ended, peaks), daemon=True).start()
        while siege.tally.total < messages and not (seconds and time.monotonic() - begun > seconds):
            siege.play(number, min(ROUND, max(100, messages - siege.tally.total)))
            number += 1
            if siege.honest.error or siege.place.faults():
                break
            if time.monotonic() - said > _EVERY:
                said = time.monotonic()
                grown = ", ".join(f"{name} {peak:.0f}" for name, peak in peaks.items())
                print(f"{siege.tally.total} of {messages} messages; MiB more: {grown}", file=sys.stderr)
        siege.end()
    except Exception as error:
        faults.append(f"round {number}: {type(error).__name__}: {error}")
    took = time.monotonic() - begun
    ended.set()
    tally, honest = siege.tally, siege.honest
    figures = {
        "honest.generations": honest.generated,
        "honest.token_p50_ms": f"{1000 * median(honest.seconds or [0]):.1f}",
        "honest.token_max_ms": f"{1000 * max(honest.seconds, default=0):.1f}",
        **{f"grown_mib.{name}": f"{peak:.1f}" for name, peak in peaks.items()},
        "cap_mib": cap,
        "rounds": number - first,
        "seconds": f"{took:.1f}",
        "per_second": f"{tally.total / took:.0f}",
    }
    for key, value in {**tally.lines(), **figures}.items():
        print(key, value)
    faults += siege.place.faults() + [f"unforeseen: {defect}" for defect in tally.defects]
    faults += [f"{name} grew by {peak:.0f} MiB" for name, peak in peaks.items() if peak > cap]
    faults += [f"never seen: {name}" for name in tally.missing()]
    siege.close()
    return faults


if __name__ == "__main__":
    main()
