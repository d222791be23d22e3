"""The audit's figures as a table and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from silo_agent.pictures import panels


def show_attacks(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line an attack, on stdout."""
    table = Table("attack", "knows", "finds", box=SIMPLE_HEAD)
    for name in ("recovered", "ROUGE-1/2/L", "sentences", "time"):
        table.add_column(name, no_wrap=True, justify="right")
    table.columns[0].no_wrap = True
    for row in rows:
        words = "/".join(f"{100 * row[kind]:.0f}" for kind in ("rouge1", "rouge2", "rougeL"))
        recovered, exact = f"{row['token_recovery']:.1%}", f"{row['exact_sentences']:.0%}"
        what = "all tokens" if row["about"] == "text" else "learned tokens"
        table.add_row(row["name"], row["assumes"], what, recovered, words, exact, f"{row['seconds']:.0f} s")
    Console().print(table)


def draw_attacks(rows: Sequence[Mapping[str, Any]], label: str, path: Path) -> None:
    """Bars of tokens recovered. Raises `UsageError` if matplotlib is not there."""
    with panels(path, figsize=(8, 0.6 + 0.4 * len(rows))) as axis:
        bars = axis.barh([row["name"] for row in rows], [100 * row["token_recovery"] for row in rows])
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.invert_yaxis()
        axis.set(title=label, xlabel="tokens recovered, %", xlim=(0, 108))
