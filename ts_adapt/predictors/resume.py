"""The state of a training under way, so that it goes on after its last finished epoch where it was killed.

    weights/...   average/...   best/...     of the predictor, of its moving average, and the best so far
    optimizer/<parameter>/<name>             AdamW's moments and step counts
    progress                                 a few numbers, the caller's affair

One safetensors file, replaced atomically. Whatever a training draws at random depends on the seed and the epoch alone,
so that the resumed run equals the unbroken one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ts_adapt.files import read_tensors, write_tensors
from ts_adapt.interfaces import TsAdaptError
from ts_adapt.numerics import MOST_STEPS, is_of_adam


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

    def load(
        self, states: Mapping[str, Mapping[str, Tensor]], parameters: Iterable[Tensor], progress: int
    ) -> dict[str, Any] | None:
        """{name: state dict, ..., "optimizer": {parameter: {name: value}}, "progress": [...]}; None if there is none.

        states      those that `save` will be given, for their names and shapes
        parameters  the optimizer's, in its order
        progress    how many numbers it has
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            tensors = read_tensors(self.path, {"progress": (progress,)})
        except TsAdaptError:
            return None
        found: dict[str, Any] = {name: {} for name in states}
        of_optimizer: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            group, _, rest = key.partition("/")
            if group == "optimizer":
                index, _, name = rest.partition("/")
                of_optimizer.setdefault(index, {})[name] = value
            elif group in states:
                found[group][rest] = value
        trained = {str(index): parameter for index, parameter in enumerate(parameters)}
        same = all(_kinds(found[name]) == _kinds(state) for name, state in states.items())
        same = same and all(
            index in trained and is_of_adam(state, trained[index]) for index, state in of_optimizer.items()
        )
        if not same or tensors["progress"].dtype != torch.float64:
            return None
        if not all(0 <= number <= MOST_STEPS for number in tensors["progress"].tolist()):
            return None
        optimizer = {int(index): state for index, state in of_optimizer.items()}
        return found | {"optimizer": optimizer, "progress": tensors["progress"].tolist()}


def _kinds(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in state.items()}
