"""Every kind of line that is not a conversation is refused by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from codec.errors import DataError
from silo_agent.data import chat_examples, read_chats

GOOD = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})


def line(*messages: object) -> bytes:
    return json.dumps({"messages": list(messages)}).encode()


ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
BAD = {
    "words": (b"hello", "not JSON"),
    "cut off": (GOOD[:-5].encode(), "not JSON"),
    "two values": (b"{} {}", "not JSON"),
    "nested without end": (b"[" * 100_000, "not JSON"),
    "a number without end": (b'{"messages": ' + b"1" * 5000 + b"}", "not JSON"),
    "latin-1": ('{"messages": "é"}'.encode("latin-1"), "not UTF-8 text: .* at byte 14"),
    "a list": (b"[1]", 'no "messages" list'),
    "a number": (b"1", 'no "messages" list'),
    "null": (b"null", 'no "messages" list'),
    "no messages": (b'{"text": "x"}', 'no "messages" list'),
    "messages is text": (b'{"messages": "x"}', 'no "messages" list'),
    "no message": (line(), 'no "messages" list'),
    "a message is text": (line("q", SAY), "role"),
    "no role": (line({"content": "q"}, SAY), "role"),
    "another role": (line({"role": "tool", "content": "q"}, SAY), "role"),
    "a role that is a list": (line({"role": ["user"], "content": "q"}, SAY), "role"),
    "no content": (line({"role": "user"}, SAY), "content is text"),
    "content is a number": (line({"role": "user", "content": 7}, SAY), "content is text"),
    "content is a list": (line(ASK, {"role": "assistant", "content": [SAY]}), "content is text"),
    "no answer": (line(ASK), "last message is the assistant's"),
    "a question at the end": (line(ASK, SAY, ASK), "last message is the assistant's"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_line_that_is_no_conversation(tmp_path: Path, kind: str) -> None:
    raw, why = BAD[kind]
    path = tmp_path / "notes.jsonl"
    # Far into the file, beyond any read buffer, and with a blank line that counts.
    path.write_bytes(b"\n" + (GOOD.encode() + b"\n") * 400 + raw + b"\n" + GOOD.encode())
    with pytest.raises(DataError, match=rf"notes\.jsonl, line 402: .*{why}") as caught:
        list(read_chats(path))
    assert caught.value.at == "silo"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "why"),
    [(line(SAY), "nothing that it answers"), (line({"role": "user", "content": "\ud800"}, SAY), "not text")],
)
def test_a_conversation_that_cannot_be_learned_from(tiny: Any, tmp_path: Path, raw: bytes, why: str) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + raw)
    with pytest.raises(DataError, match=rf"notes\.jsonl, line 2: .*{why}"):
        chat_examples(path, tiny.tokenizer, max_tokens=99)


def test_a_template_that_refuses_names_the_line(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    path = tmp_path / "notes.jsonl"
    path.write_text(GOOD)
    with pytest.raises(DataError, match=r"notes\.jsonl, line 1: .*refuses.*roles must alternate"):
        chat_examples(path, tiny.tokenizer, max_tokens=99)


def test_a_tokenizer_without_a_template(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.tokenizer, "chat_template", None)
    path = tmp_path / "notes.jsonl"
    path.write_text(GOOD)
    with pytest.raises(DataError, match="has no chat template") as caught:
        chat_examples(path, tiny.tokenizer, max_tokens=99)
    assert "notes" not in caught.value.what
    assert "instruction-tuned" in caught.value.hint


@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_a_file_without_a_conversation(tiny: Any, tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"notes\.jsonl holds no conversation"):
        chat_examples(path, tiny.tokenizer, max_tokens=99)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(DataError, match=f"{path.name} cannot be read: .* directory"):
            list(read_chats(path))


def test_lines_may_end_as_on_windows_and_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n" + GOOD.encode() + b"\r\n")
    assert [number for number, _ in read_chats(path)] == [1, 2]
