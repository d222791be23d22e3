"""A user's own JSONL: any fields, put into a prompt by a template such as `Translate: {source}`."""

import re
from collections.abc import Callable
from pathlib import Path

from codec.errors import DataError, UsageError
from silo_agent.tasks.item import Item
from silo_agent.tasks.records import Record

_FIELD = re.compile(r"\{(\w+)\}")


def load_template(given: str) -> str:
    """A template given as its text, or as the name of a file that holds it.

    Raises `UsageError` for one that names no field, `DataError` for a file that cannot be read.
    """
    path = Path(given)
    try:
        text = path.read_text("utf-8").strip() if "\n" not in given and path.is_file() else given
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from None
    if not _FIELD.search(text):
        raise UsageError(
            f"the template {text[:60]!r} names no field",
            hint="Fields stand in braces: 'Translate: {source}'.",
        )
    return text


def own_reader(template: str, answer: str) -> Callable[[Record], list[Item]]:
    """A reader whose items ask `template`, filled from a record, and are answered by its field `answer`.

    Fields are text or numbers; braces around anything but a name stay as they are.
    """

    def read(record: Record) -> list[Item]:
        def field(name: str) -> str:
            value = record.fields.get(name)
            numeric = isinstance(value, int | float) and not isinstance(value, bool)
            return str(value) if numeric else record.text(name)

        question = _FIELD.sub(lambda found: field(found[1]), template)
        return [Item(record.where, question, field(answer))]

    return read
