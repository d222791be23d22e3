"""A short run of `make fuzz`: every decoder reads or refuses what it is sent, and a failure would show."""

import importlib
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from codec.messages import AnyHeader, Encoding

HERE = Path(__file__).parent
FRAMES, CAP = 20_000, 256
KINDS = [str(header.__struct_config__.tag) for header in get_args(AnyHeader)]
NAMES = [
    *(f"kind.{kind}" for kind in KINDS),
    *(f"encoding.{encoding}" for encoding in [*get_args(Encoding), "mask-runs", "mask-bits"]),
]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


@pytest.fixture(scope="module")
def fuzzing() -> Iterator[Any]:
    """The package beside this file, which `fuzz.py` finds as a program does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        names = ("corpus", "message", "report", "rounds", "replay")
        yield SimpleNamespace(**{name: importlib.import_module(f"fuzzing.{name}") for name in names})


def start(*options: object) -> "subprocess.Popen[str]":
    program = [sys.executable, str(HERE / "fuzz.py"), "--cap", str(CAP), *map(str, options)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_short_run_reads_or_refuses_every_frame_within_its_memory() -> None:
    process = start("--frames", FRAMES, "--seed", 1)
    out, err = process.communicate()
    assert process.returncode == 0, err
    found = dict(line.split(" ", 1) for line in out.splitlines())
    assert found["seed"] == "1"
    assert int(found["frames"]) == int(found["read"]) + int(found["refused"]) == FRAMES
    assert [name for name in NAMES if int(found.get(f"{name}.read", 0)) == 0] == []
    assert [name for name in NAMES if int(found.get(f"{name}.refused", 0)) == 0] == []
    assert 0 < float(found["peak_mib"]) < CAP


def test_so_does_one_of_a_seed_never_tried(fuzzing: Any) -> None:
    seed, valid = secrets.randbits(32), fuzzing.corpus.corpus()
    print("seed", seed)
    tally, size, at = fuzzing.report.Tally(), fuzzing.report.ROUND, 0

    def watch(index: int, _message: Any) -> bool:
        nonlocal at
        at = index
        return True

    for number in range(FRAMES // size):
        breeder = fuzzing.rounds.Round(seed, number, valid)
        indices = range(number * size, (number + 1) * size)
        try:
            fuzzing.rounds.play(breeder, indices, fuzzing.message.read, tally, watch)
        except Exception:
            print(f"again: python tests/codec/fuzz.py --seed {seed} --only {at}")
            raise
    assert tally.frames == FRAMES
    assert [name for name in NAMES if not tally.read.get(name) or not tally.refused.get(name)] == []


def test_what_mutations_start_from_is_valid_and_of_every_kind_and_form(fuzzing: Any) -> None:
    valid = fuzzing.corpus.corpus()
    outcomes = [fuzzing.message.read(message) for group in valid.groups for message in group]
    assert {outcome.refused for outcome in outcomes} == {""}
    assert {outcome.kind for outcome in outcomes} == set(KINDS)
    assert {label for outcome in outcomes for label in outcome.labels} == {
        *(f"{dtype} raw 1" for dtype in ("f32", "bf16", "f16")),
        *("f32 planes 4", "bf16 planes 2", "f16 planes 2"),
        *(f"{dtype} steps {parts}" for dtype in ("f32", "bf16", "f16") for parts in (1, 2, 3, 4)),
        *(f"{dtype} blocks {parts}" for dtype in ("f32", "bf16", "f16") for parts in (2, 3)),
        *("bool mask-runs 1", "bool mask-bits 1"),
    }


def test_the_dearest_messages_are_read(fuzzing: Any) -> None:
    outcomes = [fuzzing.message.read(message) for message in fuzzing.corpus.corpus().heavy]
    assert {outcome.refused for outcome in outcomes} == {""}
    assert max(outcome.size for outcome in outcomes) > 50 << 20


# --- failures, planted -------------------------------------------------------------------------------

FAULTS = {
    "error": ("raise KeyError('planted')", "KeyError: 'planted'"),
    "crash": ("os.kill(os.getpid(), signal.SIGSEGV)", "the process ended with -11"),
    "loop": ("while True: pass", "the message took too long"),
    "wait": ("time.sleep(1000)", "the process stopped answering"),
    "memory": ("bytearray(300 << 20)", "MemoryError"),
}
READER = """
import os, signal, time, zlib
from fuzzing.message import read as right

def read(message):
    outcome = right(message)
    if outcome.refused and zlib.crc32(message.pack()) % 512 == 0:
        {fault}
    return outcome
"""


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, Path]]:
    """Exit code, output and folder of a run on each planted fault; all at once, as most of it is waiting."""
    begun = {}
    for name, (fault, _) in FAULTS.items():
        folder = tmp_path_factory.mktemp(name)
        (reader := folder / "reader.py").write_text(READER.format(fault=fault))
        options = ("--frames", 5000, "--seed", 3, "--jobs", 1, "--limit", 0.2, "--out", folder / "found")
        begun[name] = start(*options, "--reader", reader), folder / "found"
    ended = {}
    for name, (process, folder) in begun.items():
        _, err = process.communicate()
        ended[name] = process.returncode, err, folder
    return ended


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_run_with_its_message_in_a_file_and_again_by_its_index(
    fault: str, failures: dict[str, tuple[int, str, Path]], fuzzing: Any
) -> None:
    code, err, folder = failures[fault]
    assert code == 1
    assert FAULTS[fault][1] in err
    (path,) = folder.iterdir()
    _, seed, index = path.stem.split("-")
    assert f"failed at {index}\nmessage {path}\n" in err
    assert f"--seed {seed} --only {index}\n" in err
    assert fuzzing.replay.bred(int(seed), int(index), "").pack() == path.read_bytes()


def test_a_message_again_says_what_comes_of_it(failures: dict[str, tuple[int, str, Path]]) -> None:
    (path,) = failures["error"][2].iterdir()
    _, seed, index = path.stem.split("-")
    right = start("--seed", seed, "--only", index)
    wrong = start("--replay", path, "--reader", path.parents[1] / "reader.py")
    out, err = right.communicate()
    assert right.returncode == 0, err
    assert out.splitlines()[-1].startswith("refused ")
    out, err = wrong.communicate()
    assert wrong.returncode == 1
    assert "KeyError: 'planted'" in err
