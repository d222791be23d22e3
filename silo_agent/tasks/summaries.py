"""XSum: a news article in one sentence (Narayan et al. 2018)."""

from silo_agent.tasks.item import Item
from silo_agent.tasks.records import Record


def xsum(record: Record) -> list[Item]:
    """An article and its summary."""
    question = "Summarise this article in one sentence."
    return [Item(record.where, question, record.text("summary"), context=record.text("document"))]
