"""One message again, in this process, and what comes of it in full."""

import faulthandler
import reprlib
import sys
import traceback

import msgspec
from fuzzing.corpus import corpus
from fuzzing.message import Message
from fuzzing.report import ROUND, Tally
from fuzzing.rounds import Round, play
from fuzzing.worker import Limits, reader


def bred(seed: int, index: int, source: str) -> Message:
    """Message `index` of a seed: its round up to there is read, since messages are bred from others."""
    breeder = Round(seed, index // ROUND, corpus())
    play(breeder, range(index - index % ROUND, index), reader(source), Tally())
    return breeder.breed()


def replay(message: Message, cap_mib: int, limit: float, source: str) -> bool:
    """Print a message and what comes of it; whether it is read or refused."""
    faulthandler.enable()
    print("kind", message.kind)
    print("frames", [len(frame) for frame in message.frames])
    print("head", _told(message))
    sys.stdout.flush()
    limits = Limits(cap_mib, limit)
    limits.start(message)
    try:
        outcome = reader(source)(message)
    except BaseException:
        traceback.print_exc()
        return False
    finally:
        limits.stop()
        print(f"peak_mib {limits.peak_mib:.1f}")
    print("refused" if outcome.refused else "read", outcome.refused or outcome.labels)
    return True


def _told(message: Message) -> str:
    head = message.frames[message.head]
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxdict, brief.maxlist, brief.maxstring, brief.maxother = 6, 30, 12, 80, 80
    try:
        return brief.repr(msgspec.msgpack.decode(head[1:]))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return brief.repr(head)
