"""All attacks by name."""

from codec.errors import UsageError
from silo_agent.audit.attack import Attack
from silo_agent.audit.averaging import Averaged
from silo_agent.audit.decoder import Decoder
from silo_agent.audit.gradients import Gradients
from silo_agent.audit.matching import Matching
from silo_agent.audit.nearest import Nearest
from silo_agent.audit.search import Search
from silo_agent.audit.unseen import Unseen


def all_attacks(candidates: int) -> dict[str, Attack]:
    """Every attack by its name; searches try `candidates` tokens a position."""
    search = Search(candidates)
    attacks: list[Attack] = [
        Unseen(),
        Nearest(),
        search,
        Averaged(Nearest()),
        Averaged(search),
        Matching(),
        Decoder(),
        Decoder(
            pretrained=False,
            name="decoder-random",
            assumes="public head, noise's strength, text of the same kind",
        ),
        Gradients(),
    ]
    return {attack.name: attack for attack in attacks}


def chosen_attacks(names: str, candidates: int) -> list[Attack]:
    """Those named, with commas between, or `all`. Raises `UsageError` for an unknown name."""
    known = all_attacks(candidates)
    if names == "all":
        return list(known.values())
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise UsageError(f"there is no attack {unknown[0]!r}", hint=f"There are {', '.join(known)}.")
    return [known[name] for name in dict.fromkeys(wanted)]
