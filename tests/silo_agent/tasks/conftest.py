"""The real extracts, and items made by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from silo_agent.tasks.item import Answered, Item


@pytest.fixture(scope="session")
def real(repository: Path) -> Path:
    """Extracts of the public sets, beside a checkout."""
    place = repository.parent / "shared" / "data"
    if not place.is_dir():
        pytest.skip("needs ../shared/data, which is not part of the repository")
    return place


@pytest.fixture(scope="session")
def answered() -> Callable[..., list[Answered]]:
    """`answered((text, answer), ...)`: answers given and right ones; `fields` go to every item."""

    def make(*pairs: tuple[str, Any], **fields: Any) -> list[Answered]:
        made = []
        for text, right in pairs:
            answers = (right,) if isinstance(right, str) else tuple(right)
            made.append(Answered(Item("here", "?", answers[0], references=answers, **fields), text))
        return made

    return make
