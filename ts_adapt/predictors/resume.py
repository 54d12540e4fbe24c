"""The state of a training under way, so that it goes on after its last finished epoch where it was killed.

    weights/...   average/...   best/...     of the predictor, of its moving average, and the best so far
    optimizer/<parameter>/<name>             AdamW's moments and step counts
    progress                                 a few numbers, the caller's affair

One safetensors file, replaced atomically. Whatever a training draws at random depends on the seed and the epoch alone,
so that the resumed run equals the unbroken one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ts_adapt.files import read_tensors, write_tensors
from ts_adapt.interfaces import TsAdaptError


class Checkpoint:
    """What is kept in `path`; without one nothing is. A file that is damaged or of another network is not used."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path

    def save(
        self, states: Mapping[str, Mapping[str, Tensor]], optimizer: torch.optim.Optimizer, progress: Sequence[float]
    ) -> None:
        """Keep `states` (name -> state dict), the optimizer's, and `progress`."""
        if self.path is None:
            return
        tensors = {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": torch.as_tensor(value) for key, value in state.items()}
        tensors["progress"] = torch.tensor(progress, dtype=torch.float64)
        write_tensors(self.path, {key: value.detach().cpu().contiguous() for key, value in tensors.items()})

    def load(self, states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any] | None:
        """{name: state dict, ..., "optimizer": {parameter: {name: value}}, "progress": [...]}; None if there is none.

        `states` are those that `save` will be given, for their names and shapes.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            tensors = read_tensors(self.path)
        except TsAdaptError:
            return None
        found: dict[str, Any] = {name: {} for name in states} | {"optimizer": {}}
        for key, value in tensors.items():
            group, _, rest = key.partition("/")
            if group == "optimizer":
                index, _, name = rest.partition("/")
                found[group].setdefault(int(index), {})[name] = value
            elif group in states:
                found[group][rest] = value
        for name, state in states.items():
            if {k: v.shape for k, v in found[name].items()} != {k: v.shape for k, v in state.items()}:
                return None
        return found | {"progress": tensors["progress"].tolist()}

    def remove(self) -> None:
        """Remove the file: the training has ended."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
