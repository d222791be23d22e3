"""A proposal for people, and for a JSON file."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from silo_agent.planning.proposal import Measured, Proposal, Wishes, gigabytes, named
from silo_agent.planning.reasons import Reason, rate_of
from silo_agent.planning.work import Lengths, Work


def show(
    lengths: Lengths, measured: Measured, wishes: Wishes, proposal: Proposal, why: Sequence[Reason]
) -> None:
    """Facts, candidates, wires, and what is proposed and why, on stdout."""
    console = Console(highlight=False)
    for name, fact in _facts(lengths, measured, wishes.work):
        click.echo(f"{name:<8} {fact}")
    console.print(_candidates(proposal))
    console.print(_wires(proposal))
    table = Table("", "proposed", "why", box=SIMPLE_HEAD)
    for reason in why:
        table.add_row(reason.choice, reason.value, reason.why)
    console.print(table)


def _facts(lengths: Lengths, measured: Measured, work: Work) -> list[tuple[str, str]]:
    data = (
        f"{lengths.examples} examples of {lengths.median} tokens (median), {lengths.p95} (95 %), "
        f"{lengths.most} (most); {lengths.learned:.1%} learned; {lengths.steps} steps for all"
    )
    kinds = dict.fromkeys(measured.blocks)
    blocks = " or ".join(
        f"{1e3 * block.forward_s:.2f} s forward"
        + (f", {1e3 * block.backward_s:.2f} s backward" if work.training else "")
        for block in kinds
    )
    ends = measured.rest.embed_s + measured.rest.predict_s * work.predicted / work.tokens
    return [
        ("data", data),
        ("machine", f"1,000 tokens take a block {blocks}, embeddings and lm_head {1e3 * ends:.2f} s"),
        ("memory", f"{gigabytes(measured.memory)} may be taken"),
        ("line", _line(measured)),
    ]


def _line(measured: Measured) -> str:
    line = measured.line
    if line is None:
        return "not measured: no --broker"
    trip = f"round trip {line.speed.rtt * 1e3:.1f} ms, {rate_of(measured)}" if line.speed else "not measured"
    if line.trunk_s is None:
        return f"{trip}; no trunk: {line.silent}"
    return f"{trip}; the trunk's forward takes {1e3 * line.trunk_s:.2f} s for 1,000 tokens"


def _candidates(proposal: Proposal) -> Table:
    table = Table("", "head, tail", "silo, s / 1,000 tokens", "memory", "fits", box=SIMPLE_HEAD)
    for one in proposal.compared:
        mark = "▸" if one == proposal.chosen else ""
        fits = "yes" if one.fits else "no"
        table.add_row(mark, named(one.partition), f"{1e3 * one.silo_s:.2f}", gigabytes(one.memory), fits)
    return table


def _wires(proposal: Proposal) -> Table:
    table = Table("", "wire", "bytes / token", "line, s / 1,000 tokens", box=SIMPLE_HEAD)
    picked = {pick.wire for pick in proposal.wires.values()}
    for wire, crossing in proposal.crossings.items():
        mark = "▸" if wire in picked else ""
        table.add_row(mark, wire, f"{crossing.bytes:,.0f}", f"{1e3 * crossing.line_s:.3f}")
    return table


def results_of(
    lengths: Lengths, measured: Measured, work: Work, proposal: Proposal, why: Sequence[Reason]
) -> dict[str, Any]:
    """The same for a JSON file; a rate that is too high to be measured is None."""
    line = measured.line
    speed = line.speed if line else None
    return {
        "data": dataclasses.asdict(lengths),
        "work": dataclasses.asdict(work),
        "blocks": [dataclasses.asdict(block) for block in dict.fromkeys(measured.blocks)],
        "rest": dataclasses.asdict(measured.rest),
        "memory": measured.memory,
        "line": line
        and {
            "rtt_ms": speed and speed.rtt * 1e3,
            "mbit_per_s": speed and (speed.rate * 8e-6 if math.isfinite(speed.rate) else None),
            "trunk_s": line.trunk_s,
            "silent": line.silent,
        },
        "partition": dataclasses.asdict(proposal.chosen.partition),
        "binding": proposal.binding,
        "compared": [dataclasses.asdict(one) for one in proposal.compared],
        "wires": {boundary: pick.wire for boundary, pick in proposal.wires.items()},
        "crossings": {wire: dataclasses.asdict(crossing) for wire, crossing in proposal.crossings.items()},
        "seconds": proposal.seconds,
        "reasons": [dataclasses.asdict(reason) for reason in why],
    }
