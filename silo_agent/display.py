"""What a person sees while a silo works: bars on stderr, answers on stdout."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from silo_agent.generation import Continuation
    from silo_agent.trainer import StepReport


def progress_bar() -> Progress:
    """A progress display on stderr; each task has a `facts` field for its figures."""
    return Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[facts]}"),
        console=Console(stderr=True),
    )


@contextmanager
def step_display(kind: str, steps: int, name: str) -> Iterator[Callable[["StepReport"], None]]:
    """How steps are shown: a `bar`, or one JSON object a line on stdout (`jsonl`)."""
    if kind == "jsonl":

        def line(report: "StepReport") -> None:
            print(json.dumps(dataclasses.asdict(report)), flush=True)

        yield line
        return
    with progress_bar() as progress:
        task = progress.add_task(name, total=steps, facts="waiting for a worker and the other silos")

        def advance(report: "StepReport") -> None:
            progress.update(task, completed=report.step, facts=step_facts(dataclasses.asdict(report)))

        yield advance


def step_facts(report: Mapping[str, Any]) -> str:
    """A `StepReport`'s fields in one short line, whether they come from here or from another process."""
    speed = report["tokens"] / report["seconds"]
    busy, window = f"trunk busy {report['trunk_busy']:.0%}", f"window {report['window']}"
    spent = f"  ε {report['epsilon']:.3g}" if report["epsilon"] is not None else ""
    return f"loss {report['loss']:.3f}  {speed:.0f} tok/s  {busy}  {window}{spent}"


def stream(_: int, text: str) -> None:
    """Put out a piece of an answer as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def show_answers(prompts: Sequence[str], answers: Sequence["Continuation"]) -> None:
    """End a streamed answer's line, or show the answers of a batch under their prompts."""
    if len(answers) == 1:
        click.echo()
        return
    for prompt, answer in zip(prompts, answers, strict=True):
        click.echo(f"> {prompt}\n{answer.text}\n")


def show_scores(task: str, results: Mapping[str, Any]) -> None:
    """The figures of an evaluation as a table of one row; shares of 1 as percentages."""
    figures = {name: value for name, value in results.items() if isinstance(value, int | float)}
    table = Table("task", *(name.replace("_", " ") for name in figures), box=SIMPLE_HEAD)
    table.add_row(task, *(_figure(name, value) for name, value in figures.items()))
    Console().print(table)


def _figure(name: str, value: float) -> str:
    digits = {"loss": ".4f", "perplexity": ".2f", "seconds": ".1f"}
    return format(value, "d" if isinstance(value, int) else digits.get(name, ".1%"))


def ask() -> str:
    """The next line a person types; empty at the end of input."""
    click.echo("> ", nl=False)
    return sys.stdin.readline().strip()
