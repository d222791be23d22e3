"""Why a proposal is what it is, in words. What it says about privacy is what docs/privacy.md measured."""

import math
from dataclasses import dataclass

from silo_agent.noise import NoiseScale
from silo_agent.planning.proposal import Measured, Part, Proposal, Wishes, gigabytes, named
from silo_agent.wires import Boundary

_PARTS: dict[Part, str] = {"silo": "this silo", "line": "the line", "trunk": "the trunk"}


@dataclass(frozen=True, slots=True)
class Reason:
    """A choice, its value as options, and why it is that."""

    choice: str
    value: str
    why: str


def reasons(measured: Measured, wishes: Wishes, noise: NoiseScale, proposal: Proposal) -> list[Reason]:
    """All choices, and what decides the speed."""
    partition = proposal.chosen.partition
    return [
        Reason(
            "partition",
            f"--head {partition.head} --tail {partition.tail}",
            f"{why_partition(measured, wishes, proposal)}. More blocks would cost time and hide nothing: a "
            "search over the vocabulary found the text behind every head that was tried",
        ),
        Reason("noise", *_noise(noise)),
        Reason("wire", *_wire(measured, proposal)),
        Reason("speed", *_speed(wishes, proposal)),
    ]


def why_partition(measured: Measured, wishes: Wishes, proposal: Proposal) -> str:
    """What bounds it."""
    takes = f"takes {gigabytes(proposal.chosen.memory)} of {gigabytes(measured.memory)}"
    wish = named(wishes.partition)
    if proposal.binding == "wish":
        return f"as wished, {takes}"
    if proposal.binding == "model":
        return f"the model: its {len(measured.blocks)} blocks leave no trunk for {wish}; {takes}"
    wanted = proposal.wanted
    return f"memory: {named(wanted.partition)} would take {gigabytes(wanted.memory)}, this {takes}"


def _noise(noise: NoiseScale) -> tuple[str, str]:
    hurdle = "no noise that leaves the model of use stops that search; it is a hurdle to a casual look"
    given = {
        "--noise": noise.relative,
        "--noise-abs": noise.absolute,
        "--noise-mean-abs": noise.mean_abs,
    }
    said = [f"{option} {value:g}" for option, value in given.items() if value]
    return (said[0], f"as wished; {hurdle}") if said else ("none", f"none was wished for; {hurdle}")


def _wire(measured: Measured, proposal: Proposal) -> tuple[str, str]:
    by_wire: dict[str, list[Boundary]] = {}
    for boundary, pick in proposal.wires.items():
        by_wire.setdefault(pick.wire, []).append(boundary)
    if len(proposal.crossings) == 1:
        (wire,) = by_wire
        return f"--wire {wire}", "as wished"
    if len(by_wire) == 1:
        picked = f"{next(iter(by_wire))} everywhere"
    else:
        picked = "; ".join(f"{wire}: {', '.join(boundaries)}" for wire, boundaries in by_wire.items())
    return "--wire auto", f"it would pick what is there first at {rate_of(measured)}. {picked}"


def rate_of(measured: Measured) -> str:
    """The line's rate in words."""
    if measured.line is None or measured.line.speed is None:
        return f"{measured.rate * 8e-6:g} Mbit/s, which is assumed"
    if math.isinf(measured.rate):
        return "a rate too high to be measured"
    return f"{measured.rate * 8e-6:.3g} Mbit/s"


def _speed(wishes: Wishes, proposal: Proposal) -> tuple[str, str]:
    measured, slowest = proposal.seconds, _PARTS[proposal.slowest]
    unknown = " and ".join(name for part, name in _PARTS.items() if part not in measured)
    parts = ", ".join(f"{_PARTS[part]} {1e3 * seconds:.2f} s" for part, seconds in measured.items())
    if wishes.work.training:
        least, how = max(measured.values()), f"they work beside one another, {slowest} is the slowest"
    else:
        least, how = sum(measured.values()), f"one after another, most of it in {slowest}"
    said = [how] if len(measured) > 1 else []
    said += [f"{unknown} not measured"] if unknown else []
    return f"{1 / least:.4g} tokens/s at most", f"for 1,000 tokens {parts}; {'; '.join(said)}"
