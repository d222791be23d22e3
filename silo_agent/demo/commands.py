"""`trunkline demo`."""

import json
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from silo_agent.display import progress_bar, step_facts
from silo_agent.processes import Process, Processes, wait_for_all
from silo_agent.report import write_report
from workers import catalog

CLINICS = ("north", "south")
_HERE = Path(__file__).parent
_QUESTION = (
    "Summarise for the ward board: A 71-year-old man has had chest tightness on the stairs for two weeks. "
    "His ECG is unchanged and troponin is negative. He starts a beta blocker today. "
    "See him in clinic on Friday."
)
_DEADLINE_S = 900.0
_BOUNDARIES = {
    "forward up": "head → trunk",
    "forward down": "trunk → tail",
    "backward up": "tail → trunk (gradient)",
    "backward down": "trunk → head (gradient)",
}


def data_file(clinic: str) -> Path:
    """A clinic's examples, as the project ships them."""
    return _HERE / f"{clinic}_clinic.jsonl"


@click.command("demo")
@click.option("--model", default="smollm2-135m", show_default=True, help="tiny needs no download.")
@click.option("--head", default=2, show_default=True, metavar="P", help="Blocks each silo keeps in front.")
@click.option("--tail", default=2, show_default=True, metavar="Q", help="Blocks each silo keeps behind.")
@click.option("--steps", default=16, show_default=True, type=click.IntRange(min=1))
@click.option("--noise", default=0.05, show_default=True, help="Noise on what leaves the head.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo-out"), show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write what was measured here.")
def demo(
    model: str, head: int, tail: int, steps: int, noise: float, out: Path, json_path: Path | None
) -> None:
    """Two fictional clinics fine-tune one model through a broker and a worker, all on this machine.

    \b
    Examples:
      trunkline demo
      trunkline demo --model tiny
    """
    console = Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begun = time.monotonic()
    if model in catalog.MODELS:
        catalog.fetch(model, lambda line: console.print(f"[dim]{line}[/]"))
    with Processes(out / "logs") as processes:
        broker = processes.broker()
        worker = processes.start("worker", "worker", "--broker", broker, "--model", model)
        shared = [f"--broker={broker}", f"--model={model}", f"--head={head}", f"--tail={tail}"]
        shared += [f"--noise={noise}"]
        console.print(f"broker at {broker}, one worker, silos: {', '.join(CLINICS)}")
        reports = _train(processes, worker, shared, steps, out)
        answers = _ask(processes, worker, shared, out)
    _show(console, reports, answers)
    seconds = time.monotonic() - begun
    console.print(
        f"\nDone in {seconds:.0f} s. Each clinic's adapter, for plain PEFT: {out}/north, {out}/south"
    )
    settings = {"model": model, "head": head, "tail": tail, "steps": steps, "noise": noise}
    results = {"silos": reports, "answers": answers, "seconds": seconds}
    write_report(json_path, "demo", settings, results)


def _train(
    processes: Processes, worker: Process, shared: list[str], steps: int, out: Path
) -> dict[str, dict[str, Any]]:
    """Both clinics train at once; what each measured."""
    files = {clinic: out / f"{clinic}.json" for clinic in CLINICS}
    with progress_bar() as progress:
        silos = []
        for clinic in CLINICS:
            task = progress.add_task(clinic, total=steps, facts="loading")
            options = [
                f"--name={clinic}",
                "--run=clinics",
                "--silos=2",
                f"--steps={steps}",
                "--warmup=2",
                "--batch=3",
            ]
            options += ["--lr=0.002", f"--data={data_file(clinic)}", f"--out={out / clinic}"]
            options += ["--progress=jsonl", f"--json={files[clinic]}"]
            show = partial(_show_step, progress, task)
            silos.append(processes.start(clinic, "silo", "train", *shared, *options, on_line=show))
        wait_for_all(silos, worker, _DEADLINE_S, "the demo did not get on")
    return {clinic: json.loads(file.read_text())["results"] for clinic, file in files.items()}


def _show_step(progress: Any, task: Any, line: str) -> None:
    step = json.loads(line)
    progress.update(task, completed=step["step"], facts=step_facts(step))


def _ask(processes: Processes, worker: Process, shared: list[str], out: Path) -> dict[str, Any]:
    """The same question to the base model and to the north clinic's fine-tuned one."""
    silos, files = [], {}
    for label, extra in (("before", []), ("after", [f"--adapter={out / 'north'}"])):
        files[label] = out / f"answer-{label}.json"
        options = [f"--prompt={_QUESTION}", "--max-tokens=48", f"--json={files[label]}", *extra]
        silos.append(processes.start(f"ask-{label}", "silo", "generate", *shared, *options))
    wait_for_all(silos, worker, _DEADLINE_S, "the demo did not get on")
    return {label: json.loads(file.read_text())["results"] for label, file in files.items()}


def _show(console: Console, reports: dict[str, dict[str, Any]], answers: dict[str, dict[str, Any]]) -> None:
    table = Table(title="What crossed the wire while training", title_justify="left")
    table.add_column("boundary")
    for clinic in CLINICS:
        table.add_column(f"{clinic}: bytes/token", justify="right")
    for key, label in _BOUNDARIES.items():
        table.add_row(label, *(_per_token(reports[clinic], key) for clinic in CLINICS))
    console.print(table)
    for clinic in CLINICS:
        report = reports[clinic]
        busy = [step["trunk_busy"] for step in report["steps"]]
        console.print(
            f"{clinic}: loss {report['loss_first']:.3f} → {report['loss_last']:.3f}, "
            f"trunk busy {sum(busy) / len(busy):.0%}"
        )
    after = answers["after"]
    sizes = [_per_token(after, f"extend {way}") for way in ("up", "down")]
    console.print(f"generating: {sizes[0]} bytes up and {sizes[1]} down per token\n\n[bold]{_QUESTION}[/]")
    for label in ("before", "after"):
        console.print(f"[bold]{label} fine-tuning:[/] {answers[label]['answers'][0]['text'].strip()}")


def _per_token(report: dict[str, Any], boundary: str) -> str:
    traffic = report["traffic"]
    return f"{traffic['bytes'][boundary] / max(1, traffic['tokens'][boundary]):,.0f}"
