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
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _conversation(line, f"{path}, line {number}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _conversation(line: str, where: str) -> Messages:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
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
    for number, messages in read_chats(path):
        example = _example(tokenizer, messages, max_tokens, everything)
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
    ids = prompt_ids(tokenizer, messages, answer_next=False)
    answer = [everything] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and not everything:
            # What the template puts before an answer is not learned, what it puts behind it is.
            before = len(prompt_ids(tokenizer, messages[:index], answer_next=True))
            behind = len(prompt_ids(tokenizer, messages[: index + 1], answer_next=False))
            answer[before:behind] = [True] * (behind - before)
    return Example(tuple(ids[:limit]), tuple(answer[:limit]))


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, answer_next: bool
) -> list[int]:
    """Token ids of a conversation in the model's chat template.

    Raises `DataError` if the model has no template or the template refuses the conversation.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template",
            hint="Use an instruction-tuned model.",
        )
    try:
        encoded: Any = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=answer_next, tokenize=True, return_dict=True
        )
    except Exception as error:  # Jinja templates raise what they like.
        raise DataError(f"the chat template refuses this conversation: {error}") from None
    return list(encoded["input_ids"])
