"""Everything that a proposal is made from, measured as a silo's options say."""

from contextlib import closing
from dataclasses import replace

from codec.messages import ENCODINGS
from codec.partition import Partition
from codec.plan import LoraPlan
from silo_agent.options import SiloOptions
from silo_agent.planning.line import measure_line
from silo_agent.planning.machine import Machine
from silo_agent.planning.memory import usable_memory
from silo_agent.planning.proposal import BOUNDARIES, Measured
from silo_agent.planning.work import Work
from silo_agent.remote import Remote
from silo_agent.wires import Wires
from workers.checkpoint import Checkpoint


def measure_machine(
    options: SiloOptions, checkpoint: Checkpoint, work: Work, lora: LoraPlan, memory: int | None = None
) -> Measured:
    """This machine alone; `memory` bytes may be taken, or what is free of its memory.

    Raises `ModelError`, `UsageError`, and `MismatchError` for an adapter that the model cannot have.
    """
    device, dtype = options.placed()
    usable = usable_memory(device) if memory is None else memory
    machine = Machine(checkpoint, work, lora, dtype=dtype, device=device)
    return Measured(machine.blocks(), machine.rest(), int(checkpoint.config.hidden_size), usable)


def measure_way(
    measured: Measured, options: SiloOptions, checkpoint: Checkpoint, work: Work, partition: Partition
) -> Measured:
    """With the line to the trunk that `partition` leaves, if the options name a broker, and what wires cost.

    Raises `LinkError` for a broker that cannot be reached.
    """
    device, dtype = options.placed()
    line = None
    if options.broker:
        link = options.link()
        with closing(Remote(link, deadline=options.deadline)) as remote:
            trunk = partition.spans(checkpoint.blocks)[1]
            card = checkpoint.card(range(trunk.start, trunk.stop))
            line = measure_line(remote, link, card, trunk, dtype)
    encodings = line.encodings if line else ENCODINGS
    wires = Wires(options.wire, encodings=lambda: encodings, noise=options.noise, dtype=dtype, device=device)
    costs = {boundary: wires.costs(boundary, measured.hidden) for boundary in BOUNDARIES[work.training]}
    return replace(measured, line=line, wires=costs)
