"""An honest silo whose worker or broker is hostile: it may hear any error of the tree, and no other."""

from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from siege.tally import Tally

from broker.link import ZmqLink
from codec.errors import TrunklineError
from codec.messages import Extend, OpenSession, kind_of
from codec.plan import ModelCard
from silo_agent.packed import pack
from silo_agent.remote import Remote, silo_attach

BLOCKS = {"start": 1, "stop": 3}
_DEADLINE_S = 0.05


class Victim:
    """Opens sessions and extends them, whatever is answered."""

    def __init__(self, endpoint: str, tally: Tally) -> None:
        self._endpoint, self._tally, self._names = endpoint, tally, count()
        self._attach()

    def ask(self, card: ModelCard, requests: int) -> None:
        """So many requests, one by one."""
        for number in range(requests):
            if number % 16 == 0:
                name = f"v{next(self._names)}"
                self._call(OpenSession(session=name, model=card, rows=1, capacity=64, **BLOCKS), ())
            fields = {"rows": (0,), "starts": (number % 16,), "lengths": (1,)}
            self._call(Extend(session=name, **fields), (torch.ones(1, card.hidden),))

    def _call(self, request: Any, values: Sequence[torch.Tensor]) -> None:
        try:
            arrival = self._remote.wait(self._remote.send(pack(request, values)))
        except TrunklineError as error:
            self._tally.reactions[f"victim.raised.{type(error).__name__}"] += 1
            if self._remote._link._failure is not None:  # type: ignore[attr-defined]
                self.close()
                self._attach()
        except Exception as error:
            self._tally.defects.append(f"victim: {type(error).__name__}: {error}")
        else:
            self._tally.reactions[f"victim.accepted.{kind_of(arrival.header)}"] += 1

    def _attach(self) -> None:
        self._remote = Remote(ZmqLink(self._endpoint, silo_attach("victim")), deadline=_DEADLINE_S)

    def close(self) -> None:
        """Close its link."""
        self._remote.close()
