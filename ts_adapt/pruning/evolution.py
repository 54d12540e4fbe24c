"""Which blocks to leave out: the evolution of SnapFusion (Li et al. 2023, arXiv:2306.00980, section 3.1), one way.

With R what has been left out, D(R) the distance of the images to those of the full network, from the same noises by the
same few-step solve, and C(R) what an image costs, each round leaves out the block

    argmin over i of  (D(R + i) - D(R)) / (C(R) - C(R + i))        the least loss of quality for what is saved

of those with C(R + i) < C(R), every block measured anew in every round, until C(R) is low enough or D(R + i) would be
too high. Nothing is trained, and nothing comes back in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from torch import nn

from ts_adapt.errors import TsAdaptError
from ts_adapt.options import MANY, Between, check_options
from ts_adapt.pruning.blocks import candidates, pruned, put_back, remove, removed


@dataclass
class PruneOptions:
    """How far blocks are left out, and by what they are judged."""

    cost: Annotated[float, Between(0, 1)] = 0.75
    """Stop where an image costs at most this share of the full network's."""
    distance: Annotated[float, Between(0, math.inf)] | None = None
    """Leave nothing out that would bring the distance to the full network's images above this; None: no limit."""
    measure: Literal["flops", "seconds"] = "flops"
    """What an image costs: flops or seconds."""
    samples: Annotated[int, Between(2, MANY)] = 64
    """Noises that the distance is measured on, of those for training."""


@dataclass(frozen=True)
class Round:
    """One block that was left out, what it is, and what held after it: D, and C as a share of the full network's."""

    removed: str
    kind: str
    distance: float
    cost: float


def evolve(
    network: nn.Module,
    distance: Callable[[], float],
    cost: Callable[[], float],
    options: PruneOptions,
    *,
    tried: Callable[[], object] = lambda: None,
) -> Iterator[Round]:
    """The rounds for `network`, one by one; afterwards it is as it was before.

    distance, cost  D and C of `network` as it is when they are called
    tried           called behind every block that was measured

    Raises TsAdaptError for a network without such blocks or with some left out already, and for a limit below zero.
    """
    check_options(options, "prune.")
    if removed(network):
        raise TsAdaptError(
            f"this {type(network).__name__} is without {', '.join(removed(network))} already; give the full network"
        )
    full, now_distance, now_cost, done = cost(), distance(), 1.0, 0
    try:
        while now_cost > options.cost:
            found: list[tuple[float, str, float, float]] = []
            for name in candidates(network):
                with pruned(network, name):
                    new_distance, new_cost = distance(), cost() / full
                tried()
                allowed = options.distance is None or new_distance <= options.distance
                if new_cost < now_cost and allowed:
                    found.append(((new_distance - now_distance) / (now_cost - new_cost), name, new_distance, new_cost))
            if not found:
                return
            _, name, now_distance, now_cost = min(found)
            kind = type(network.get_submodule(name)).__name__
            remove(network, name)
            done += 1
            yield Round(name, kind, now_distance, now_cost)
    finally:
        put_back(network, done)
