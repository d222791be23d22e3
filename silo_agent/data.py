"""Reading a silo's private text: chat examples, one JSON object a line.

The format is the common one of fine-tuning sets:
`{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from codec.errors import DataError
from silo_agent.microbatch import Example
from silo_agent.tasks.records import read_lines

Messages = list[dict[str, str]]
_ROLES = ("system", "user", "assistant")


def read_chats(path: Path) -> Iterator[tuple[int, Messages]]:
    """Line numbers and conversations of a JSONL file, as a stream.

    Raises `DataError` naming file and line for anything that is not a conversation with an answer.
    """
    for number, record in read_lines(path):
        yield number, _conversation(record, f"{path}, line {number}")


def _conversation(record: Any, where: str) -> Messages:
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
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    everything: bool = False,
    template: str | None = None,
    limit: int | None = None,
) -> list[Example]:
    """The first `limit` conversations, tokenized; loss on the assistant's words, or on `everything`.

    A conversation over `max_tokens` is cut at its end. `template` stands for the model's own. Raises
    `DataError` if a cut leaves nothing to learn, or if the file holds no conversation.
    """
    examples = []
    check_template(tokenizer, template)
    for number, messages in islice(read_chats(path), limit):
        try:
            whole = example_of(tokenizer, messages, everything=everything, template=template)
            example = Example(whole.ids[:max_tokens], whole.answer[:max_tokens])
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


def example_of(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    everything: bool = False,
    template: str | None = None,
) -> Example:
    """A whole conversation as tokens; every answer with its end token is learned, or `everything`.

    Raises `DataError`.
    """
    whole = _rendered(tokenizer, messages, template, answer_next=False)
    learned = [(0, len(whole))]
    if not everything:
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        places = [_answer(tokenizer, messages, index, whole, template) for index in answers]
        learned = [(start, stop) for start, _, stop in places]
    return _marked(tokenizer, whole, learned)


def candidate_of(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, template: str | None = None
) -> Example:
    """As `example_of`, but `answer` marks the last message's words alone, without an end token."""
    whole = _rendered(tokenizer, messages, template, answer_next=False)
    start, words, _ = _answer(tokenizer, messages, len(messages) - 1, whole, template)
    return _marked(tokenizer, whole, [(start, words)])


def _marked(tokenizer: PreTrainedTokenizerBase, text: str, parts: Sequence[tuple[int, int]]) -> Example:
    encoded = encode(tokenizer, text, special=False)
    begins = [begin for begin, _ in encoded["offset_mapping"]]
    marks = [any(start <= at < stop for start, stop in parts) for at in begins]
    return Example(tuple(encoded["input_ids"]), tuple(marks))


def _answer(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, index: int, whole: str, template: str | None
) -> tuple[int, int, int]:
    """Where in `whole` message `index` begins, where its words end, and the template's end token."""
    if index == 0:
        raise DataError("the first message is the assistant's: there is nothing that it answers")
    before = _rendered(tokenizer, messages[:index], template, answer_next=True)
    last = index + 1 == len(messages)
    behind = whole if last else _rendered(tokenizer, messages[: index + 1], template, answer_next=False)
    if not behind.startswith(before) or not whole.startswith(behind):
        raise DataError(
            "the chat template rewrites earlier turns, so what is to be learned cannot be told",
            hint="Give each question with its answer a line of its own.",
        )
    # White space behind the end token is never generated. Without an end token, it is the end.
    words, answer = messages[index]["content"].strip(), behind[len(before) :]
    ending = answer.split(words, 1)[-1] if words else answer
    return len(before), len(behind) - len(ending), len(behind.rstrip() if ending.strip() else behind)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    *,
    answer_next: bool,
    template: str | None = None,
) -> list[int]:
    """Token ids of a conversation in the model's chat template, or in `template`.

    Raises `DataError` if there is no template or it refuses the conversation.
    """
    check_template(tokenizer, template)
    text = _rendered(tokenizer, messages, template, answer_next=answer_next)
    return text_ids(tokenizer, text, special=False)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Token ids of `text`, with the model's first token if `special`. Raises `DataError`."""
    return list(encode(tokenizer, text, special=special)["input_ids"])


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> Any:
    """`input_ids` and `offset_mapping` of `text`. Raises `DataError` for half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"not text: {error.reason} at character {error.start}") from None
    return tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)


def check_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Raises `DataError` if there is neither a `template` nor a model's own."""
    if template is None and tokenizer.chat_template is None:
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template",
            hint="Use an instruction-tuned model.",
        )


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    template: str | None,
    *,
    answer_next: bool,
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), chat_template=template, add_generation_prompt=answer_next, tokenize=False
            )
        )
    except Exception as error:  # Jinja templates raise what they like.
        raise DataError(f"the chat template refuses this conversation: {error}") from None
