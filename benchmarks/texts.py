"""What benchmarks read: the user's file, or the demo's notes."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from codec.errors import DataError
from silo_agent.data import read_chats
from silo_agent.demo.commands import CLINICS, data_file


def notes() -> list[str]:
    """The demo's notes, one text each."""
    return [
        " ".join(message["content"] for message in messages)
        for clinic in CLINICS
        for _, messages in read_chats(data_file(clinic))
    ]


def tokenized(ref: str, file: Path | None, *, tokens: int, max_length: int) -> Sequence[Sequence[int]]:
    """Token ids of `file`'s lines, or of the notes, until there are `tokens` of them.

    Raises `DataError` if there is no line of two tokens or more.
    """
    tokenizer = AutoTokenizer.from_pretrained(ref)
    texts: list[list[int]] = []
    for line in file.read_text().splitlines() if file else notes():
        ids = tokenizer(line)["input_ids"][:max_length]
        if len(ids) > 1:
            texts.append(ids)
        if sum(map(len, texts)) >= tokens:
            break
    if not texts:
        raise DataError(f"{file} holds no line of two tokens or more")
    return texts
