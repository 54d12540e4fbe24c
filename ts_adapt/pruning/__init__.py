"""Pruning: blocks of a UNet are left out, and put back exactly as they were."""

from ts_adapt.pruning.blocks import candidates, pruned, put_back, remove, removed
from ts_adapt.pruning.evolution import PruneOptions, Round, evolve
from ts_adapt.pruning.plan_file import read, save

__all__ = [
    "PruneOptions", "Round", "candidates", "evolve", "pruned", "put_back", "read", "remove", "removed", "save",
]  # fmt: skip
