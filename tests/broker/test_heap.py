"""Page faults of a process that takes and frees blocks of a message's size, with the setting and without."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROUNDS = 500

PROGRAM = f"""
import resource, sys
from broker.heap import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()


def messages(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({ROUNDS}):
        del [b"x" * size for _ in range(4)][:]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


print(messages(70_000), messages(1 << 20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_the_pages_of_a_message_are_there_for_the_next(repository: Path) -> None:
    def faults(what: str) -> list[int]:
        command = [sys.executable, "-c", PROGRAM, what]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60, check=True)
        return [int(number) for number in done.stdout.split()]

    small, large = faults("kept")
    assert small < ROUNDS
    assert large < 10 * ROUNDS
    assert faults("as it was")[0] > 10 * small
