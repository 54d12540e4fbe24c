"""The file that says which blocks a network is without.

    {"format", "version", "network": its class, "blocks": all that could go, "removed": what went, in order, ...}

It fits a network of the same class with the same blocks; weights are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from ts_adapt.errors import TsAdaptError
from ts_adapt.pruning.blocks import candidates
from ts_adapt.pruning.evolution import Round
from ts_adapt.storage import files
from ts_adapt.storage.layout import PRUNED_NETWORK

SCHEMA: files.Schema = {"format": str, "version": int, "network": str, "blocks": list, "removed": list}


def save(path: str | Path, network: nn.Module, rounds: Sequence[Round], about: Mapping[str, Any]) -> None:
    """Write what `evolve` found for the full `network`, and how: `about` is JSON."""
    kept = {
        **PRUNED_NETWORK.head, "network": type(network).__name__, "blocks": candidates(network),
        "removed": [one.removed for one in rounds], "rounds": [asdict(one) for one in rounds], "about": dict(about),
    }  # fmt: skip
    files.write_json(Path(path), kept)


def read(path: str | Path, network: nn.Module | None = None) -> list[str]:
    """The blocks that the file in `path` leaves out, in the order in which they go; of `network`, where it is given.

    Raises TsAdaptError for a file that is missing, damaged, of another kind, or for another network.
    """
    kept = files.read_json(Path(path), SCHEMA)
    PRUNED_NETWORK.check(kept, path, "make one with `ts-adapt prune`")
    gone = kept["removed"]
    if not all(isinstance(block, str) and block in kept["blocks"] for block in gone) or len({*gone}) < len(gone):
        raise TsAdaptError(f"{path} is damaged, it leaves out what is no block; make it again with `ts-adapt prune`")
    if network is not None and (kept["network"] != type(network).__name__ or kept["blocks"] != candidates(network)):
        raise TsAdaptError(
            f"{path} is for the network {kept['network']} of {len(kept['blocks'])} blocks, and this "
            f"{type(network).__name__} has others; give the model that it was made for, or make one with "
            "`ts-adapt prune`"
        )
    return [str(block) for block in gone]
