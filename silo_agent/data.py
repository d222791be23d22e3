"""Reading a silo's private text: chat examples, one JSON object a line.

The format is the common one of fine-tuning sets:
`{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from codec.errors import DataError
from silo_agent.microbatch import Example

Messages = list[dict[str, str]]
_ROLES = ("system", "user", "assistant")


def read_chats(path: Path) -> Iterator[tuple[int, Messages]]:
    """Line numbers and conversations of a JSONL file, as a stream.

    Raises `DataError` naming file and line for anything that is not a conversation with an answer.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _conversation(line, f"{path}, line {number}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _conversation(line: bytes, where: str) -> Messages:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # A number of thousands of digits, lists without end.
        raise DataError(f"{where}: not JSON that can be read: {error}") from None
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{where}: no "messages" list', hint='A line is {"messages": [{"role", "content"}]}.')
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise DataError(f"{where}: a message's role is one of {', '.join(_ROLES)}")
        if not isinstance(message.get("content"), str):
            raise DataError(f"{where}: a message's content is text")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: the last message is the assistant's, there is nothing to learn else")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def chat_examples(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, everything: bool = False
) -> list[Example]:
    """Tokenized conversations; loss on the assistant's words, or on `everything`.

    A conversation over `max_tokens` is cut at its end. Raises `DataError` if a cut leaves nothing to
    learn, or if the file holds no conversation.
    """
    examples = []
    _check_template(tokenizer)
    for number, messages in read_chats(path):
        try:
            example = _example(tokenizer, messages, max_tokens, everything)
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error.what}", hint=error.hint) from None
        if not any(example.answer[1:]):
            raise DataError(
                f"{path}, line {number}: no answer within the first {max_tokens} tokens",
                hint="Shorten the prompt or raise --max-length.",
            )
        examples.append(example)
    if not examples:
        raise DataError(f"{path} holds no conversation")
    return examples


def _example(tokenizer: PreTrainedTokenizerBase, messages: Messages, limit: int, everything: bool) -> Example:
    whole = _rendered(tokenizer, messages, answer_next=False)
    learned = [(0, len(whole))]
    if not everything:
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        learned = [_answer(tokenizer, messages, index, whole) for index in answers]
    encoded = _encoded(tokenizer, whole, special=False)
    begins = [begin for begin, _ in encoded["offset_mapping"]]
    answer = [any(start <= at < stop for start, stop in learned) for at in begins]
    return Example(tuple(encoded["input_ids"][:limit]), tuple(answer[:limit]))


def _answer(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, index: int, whole: str
) -> tuple[int, int]:
    """Where in `whole` message `index` stands: its words and the template's end token behind them."""
    if index == 0:
        raise DataError("the first message is the assistant's: there is nothing that it answers")
    before = _rendered(tokenizer, messages[:index], answer_next=True)
    behind = _rendered(tokenizer, messages[: index + 1], answer_next=False)
    if not behind.startswith(before) or not whole.startswith(behind):
        raise DataError(
            "the chat template rewrites earlier turns, so what is to be learned cannot be told",
            hint="Give each question with its answer a line of its own.",
        )
    # White space behind the end token is never generated. Without an end token, it is the end.
    words, answer = messages[index]["content"].strip(), behind[len(before) :]
    ending = answer.split(words, 1)[-1] if words else answer
    return len(before), len(behind.rstrip() if ending.strip() else behind)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, answer_next: bool
) -> list[int]:
    """Token ids of a conversation in the model's chat template.

    Raises `DataError` if the model has no template or the template refuses the conversation.
    """
    _check_template(tokenizer)
    return text_ids(tokenizer, _rendered(tokenizer, messages, answer_next=answer_next), special=False)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Token ids of `text`, with the model's first token if `special`. Raises `DataError`."""
    return list(_encoded(tokenizer, text, special)["input_ids"])


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> Any:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"not text: {error.reason} at character {error.start}") from None
    return tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None:
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template",
            hint="Use an instruction-tuned model.",
        )


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, answer_next: bool
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), add_generation_prompt=answer_next, tokenize=False)
        )
    except Exception as error:  # Jinja templates raise what they like.
        raise DataError(f"the chat template refuses this conversation: {error}") from None
