"""`trunkline silo generate`, `chat` and `eval`."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import click

from codec.errors import DataError, UsageError
from silo_agent.display import ask, progress_bar, show_answers, show_scores, stream
from silo_agent.options import (
    SiloOptions,
    delta_option,
    load_saved,
    load_tokenizer,
    open_silo,
    silo_options,
)
from silo_agent.planning.automatic import partition_option, settled
from silo_agent.planning.work import generating_work
from silo_agent.report import settings_of, write_report
from silo_agent.tasks.options import DataOptions, data_options

_FILE = click.Path(path_type=Path)
_LINES = click.File(encoding="utf-8")
_COUNT = click.IntRange(min=1)


@click.command("generate")
@silo_options
@delta_option
@partition_option
@click.option("--prompt", "prompts", multiple=True, help="May be given several times.")
@click.option("--prompts", "file", type=_LINES, help="One prompt a line; - is standard input.")
@click.option("--batch", default=16, show_default=True, type=_COUNT, help="Prompts that go on together.")
@click.option("--raw", is_flag=True, help="Continue the text as it is, without the chat template.")
@click.option("--system", help="System message before each prompt.")
@click.option("--adapter", type=_FILE, help="A PEFT adapter to use, as `silo train` writes it.")
@click.option("--max-tokens", default=128, show_default=True, type=_COUNT)
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, help="0: all tokens.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--repetition-penalty", default=1.0, show_default=True)
@click.option("--stop", "stops", multiple=True, help="Text that ends an answer; may be repeated.")
@click.option("--seed", type=int, help="Of the sampling.")
@click.option("--json", "json_path", type=_FILE, help="Write answers and measurements here.")
def generate_command(options: SiloOptions, **given: Any) -> None:
    """Answer prompts with the split model, streaming.

    \b
    Examples:
      trunkline silo generate --broker tcp://127.0.0.1:7555 --model smollm2-135m \\
          --prompt "What is the capital of France?"
      trunkline silo generate --broker tcp://127.0.0.1:7555 --model smollm2-135m \\
          --adapter north --noise 0.05 --prompts questions.txt --json answers.json
    """
    options.check_delta(given["delta"])
    try:
        texts = [*given["prompts"], *(line.rstrip("\n") for line in given["file"] or () if line.strip())]
    except UnicodeDecodeError as error:
        raise DataError(f"{given['file'].name} is not UTF-8 text: {error.reason}") from None
    if not texts:
        raise UsageError("nothing to answer", hint="Give --prompt TEXT or --prompts FILE.")

    from silo_agent.data import prompt_ids, text_ids
    from silo_agent.generation import generate
    from silo_agent.sampling import Sampling

    sampling = Sampling(
        given["temperature"], given["top_k"], given["top_p"], given["repetition_penalty"], given["seed"]
    )
    saved = load_saved(given["adapter"])
    tokenizer = load_tokenizer(options.model)
    system = [{"role": "system", "content": given["system"]}] if given["system"] else []
    prompts = [
        text_ids(tokenizer, text)
        if given["raw"]
        else prompt_ids(tokenizer, [*system, {"role": "user", "content": text}], answer_next=True)
        for text in texts
    ]
    rows, capacity = min(len(prompts), given["batch"]), max(map(len, prompts)) + given["max_tokens"]
    options = settled(options, given["partition"], generating_work(rows, capacity))
    with open_silo(options, tokenizer) as silo:
        begun = time.monotonic()
        with silo.session(rows, capacity, saved) as session:
            answers = generate(
                session,
                silo.tokenizer,
                prompts,
                max_tokens=given["max_tokens"],
                ends=silo.stop_tokens,
                sampling=sampling,
                stops=given["stops"],
                on_text=stream if len(prompts) == 1 else None,
            )
        seconds = time.monotonic() - begun
        show_answers(texts, answers)
        made = sum(len(answer.tokens) for answer in answers)
        results = {
            "answers": [
                {"prompt": text, **dataclasses.asdict(answer)}
                for text, answer in zip(texts, answers, strict=True)
            ],
            "tokens_per_s": made / seconds,
            "traffic": silo.traffic(),
            **silo.spent(given["delta"]),
        }
        write_report(given["json_path"], "silo-generate", dataclasses.asdict(options), results)


@click.command("chat")
@silo_options
@delta_option
@partition_option
@click.option("--system", help="System message of the conversation.")
@click.option("--adapter", type=_FILE, help="A PEFT adapter to use.")
@click.option("--max-tokens", default=512, show_default=True, type=_COUNT, help="Longest answer.")
@click.option(
    "--context", default=4096, show_default=True, type=_COUNT, help="Longest conversation, in tokens."
)
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True)
def chat(options: SiloOptions, **given: Any) -> None:
    """Talk with the split model; an empty line or Ctrl-D ends it. Earlier turns stay cached.

    \b
    Examples:
      trunkline silo chat --broker tcp://127.0.0.1:7555 --model smollm2-135m
    """
    from silo_agent.conversation import Conversation
    from silo_agent.sampling import Sampling

    options.check_delta(given["delta"])
    sampling = Sampling(temperature=given["temperature"], top_p=given["top_p"])
    saved = load_saved(given["adapter"])
    tokenizer = load_tokenizer(options.model)
    options = settled(options, given["partition"], generating_work(1, given["context"]))
    with open_silo(options, tokenizer) as silo, silo.session(1, given["context"], saved) as session:
        talk = Conversation(session, silo.tokenizer, silo.stop_tokens, sampling, given["system"])
        while line := ask():
            talk.say(line, given["max_tokens"], lambda text: stream(0, text))
            click.echo()
        silo.spent(given["delta"])


@click.command("eval")
@silo_options
@delta_option
@partition_option
@data_options
@click.option("--adapter", type=_FILE, help="A PEFT adapter to use.")
@click.option("--batch", default=4, show_default=True, type=_COUNT, help="Examples done at a time.")
@click.option("--max-new-tokens", type=_COUNT, help="Longest written answer; else the task's own.")
@click.option("--json", "json_path", type=_FILE, help="Write the scores here.")
def evaluate_command(options: SiloOptions, data: DataOptions, **given: Any) -> None:
    """A task's official scores; for `chat` and `jsonl` loss, perplexity and token accuracy.

    \b
    Examples:
      trunkline silo eval --broker tcp://127.0.0.1:7555 --model smollm2-135m --data held-out.jsonl
      trunkline silo eval --broker tcp://127.0.0.1:7555 --model smollm2-135m \\
          --task boolq --data BoolQ/val.jsonl --adapter adapter --json boolq.json
    """
    from silo_agent.tasks.exam import Exam

    options.check_delta(given["delta"])
    saved = load_saved(given["adapter"])
    task = data.task(given["max_new_tokens"])
    rows, asks = given["batch"], task is not None and task.score is not None
    capacity = data.max_length + (task.new_tokens if task else 0)
    work = generating_work(rows, capacity, scored=0 if asks else rows * capacity)
    options = settled(options, given["partition"], work)
    with open_silo(options, load_tokenizer(options.model)) as silo, progress_bar() as bar:
        shown = bar.add_task(data.task_name, total=None, facts="")
        exam = Exam(
            lambda rows, capacity: silo.session(rows, capacity, saved),
            given["batch"],
            lambda done: bar.advance(shown, done),
        )
        begun = time.monotonic()
        if task is None or (score := task.score) is None:
            examples = data.examples(silo.tokenizer, "validation")
            bar.update(shown, total=len(examples))
            scores = dataclasses.asdict(exam.loss(examples))
        else:
            threads = data.threads(task, "validation")
            bar.update(shown, total=sum(map(len, threads)))
            answers = exam.answers(task, threads, data.rendering(silo.tokenizer), silo.stop_tokens)
            scores = {**score(answers), "examples": len(answers)}
        results = {**scores, "seconds": time.monotonic() - begun, "traffic": silo.traffic()}
        results |= silo.spent(given["delta"])
        write_report(given["json_path"], "silo-eval", settings_of(options, data), results)
    show_scores(data.task_name, results)
