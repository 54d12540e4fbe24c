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

from ts_adapt.interfaces import TsAdaptError
from ts_adapt.pruning.blocks import candidates, put_back, remove, removed
from ts_adapt.pruning.evolution import Round
from ts_adapt.remedies import command
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


def apply(network: nn.Module, path: str | Path) -> nn.Module:
    """Leave the blocks out of `network`, in place, that the file in `path` names; `put_back` undoes it.

    Raises TsAdaptError, and leaves the network as it was, for a file that is missing, damaged, of another kind, or for
    another network.
    """
    kept = files.read_json(Path(path), SCHEMA)
    PRUNED_NETWORK.check(kept, path, f"make one with {command('prune')}")
    before, name = len(removed(network)), type(network).__name__
    if kept["network"] != name or kept["blocks"] != candidates(network):
        raise TsAdaptError(
            f"{path} is for a {kept['network']} of {len(kept['blocks'])} blocks, and this {name} has others; give the "
            f"model that it was made for, or make one with {command('prune')}"
        )
    try:
        for block in kept["removed"]:
            remove(network, str(block))
    except TsAdaptError:
        put_back(network, len(removed(network)) - before)
        raise
    return network
