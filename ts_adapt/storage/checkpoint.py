"""The state of a training under way, so that it goes on where it was killed and ends where it would have ended.

    about                         what is trained and how, as JSON: a file of another training is refused
    <name>/...                    the state dict called so: of a module, of its moving average, of a generator, ...
    optimizer/<parameter>/<name>  Adam's moments and step counts; those of several Adams are numbered on
    progress/<name>               counts, losses, distances: the caller's affair

One safetensors file, replaced atomically. It may be anybody's: one that is damaged, or holds what no training can be
in, is not used, and the training begins anew. What depends on the number of the step alone (a learning rate, a batch,
noise drawn from a seed and that number) needs no state; a `torch.Generator` that does has its `get_state()`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.storage.files import check_schema, differing, null_for_infinite, parse_json, read_tensors, write_tensors

ABOUT, OPTIMIZER, PROGRESS = "about", "optimizer", "progress"
OF_ADAM = ("step", "exp_avg", "exp_avg_sq")
"""What Adam keeps of a parameter: how many steps, and running means of its gradient and of that squared."""
LARGEST = 2**53
"""Of counts and other numbers of the progress; none is negative."""


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint held.

    states     name -> state dict
    moments    place of a parameter -> what Adam keeps of it
    progress   name -> numbers
    """

    states: dict[str, dict[str, Tensor]]
    moments: dict[int, dict[str, Tensor]]
    progress: dict[str, list[float]]

    def give(self, *optimizers: torch.optim.Optimizer) -> None:
        """Have the `optimizers`, of the same parameters in the same order, go on with these moments."""
        for places, optimizer in _placed(optimizers):
            own = {i: self.moments[place] for i, place in enumerate(places) if place in self.moments}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": own})


class Checkpoint:
    """What is kept of a training in the file `path`; without a path nothing is.

    about  all that the training depends on, as JSON; what is left out the path has to stand for
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self.path, self.about = path, json.dumps(null_for_infinite(about)).encode()

    def save(
        self,
        states: Mapping[str, Mapping[str, Tensor]],
        progress: Mapping[str, Sequence[float]],
        *optimizers: torch.optim.Optimizer,
    ) -> None:
        """Keep `states` (name -> state dict), `progress`, and what the `optimizers`, Adams, have of parameters."""
        if self.path is None:
            return
        tensors: dict[str, Tensor] = {ABOUT: torch.frombuffer(bytearray(self.about), dtype=torch.uint8)}
        tensors |= {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}
        for places, each in _placed(optimizers):
            for i, state in each.state_dict()["state"].items():
                tensors |= {f"{OPTIMIZER}/{places[i]}/{key}": torch.as_tensor(value) for key, value in state.items()}
        for name, numbers in progress.items():
            tensors[f"{PROGRESS}/{name}"] = torch.tensor(numbers, dtype=torch.float64)
        write_tensors(self.path, tensors)

    def load(
        self,
        states: Mapping[str, Mapping[str, Tensor]],
        parameters: Iterable[Tensor],
        progress: Mapping[str, int | None],
    ) -> Resumed | None:
        """What was kept, on the CPU; None where there is nothing that can be used.

        states      those that `save` will be given, for their names, shapes and precisions
        parameters  the optimizers', in their order
        progress    how many numbers there are of each name; None: any number

        Raises TsAdaptError, naming what differs, for the file of another training.
        """
        if self.path is None or not self.path.exists():
            return None
        shapes = {f"{PROGRESS}/{name}": (count,) for name, count in progress.items()}
        try:
            tensors = read_tensors(self.path, {ABOUT: (None,), **shapes})
            kept = parse_json(bytes(tensors[ABOUT].to(torch.uint8).tolist()), self.path)
            check_schema(kept, {}, self.path)
        except TsAdaptError:
            return None
        other = differing(kept, json.loads(self.about))
        if other:
            raise TsAdaptError(
                f"{self.path} is of a training with other {', '.join(other)}; remove it, or name another"
            )
        found: dict[str, dict[str, Tensor]] = {name: {} for name in (*states, OPTIMIZER, PROGRESS)}
        for key, value in tensors.items():
            group, _, rest = key.partition("/")
            found.setdefault(group, {})[rest] = value
        moments: dict[str, dict[str, Tensor]] = {}
        for key, value in found[OPTIMIZER].items():
            place, _, name = key.partition("/")
            moments.setdefault(place, {})[name] = value
        of = {str(place): parameter for place, parameter in enumerate(parameters)}
        numbers = {name: found[PROGRESS][name] for name in progress}
        if not (
            all(_kinds(found[name]) == _kinds(state) for name, state in states.items())
            and all(place in of and _is_of_adam(state, of[place]) for place, state in moments.items())
            and all(_are_counts(value) for value in numbers.values())
        ):
            return None
        return Resumed(
            {name: found[name] for name in states},
            {int(place): state for place, state in moments.items()},
            {name: value.tolist() for name, value in numbers.items()},
        )


def _placed(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[tuple[range, torch.optim.Optimizer]]:
    """Each with the places of its parameters among those of all."""
    first = 0
    for optimizer in optimizers:
        behind = first + sum(len(group["params"]) for group in optimizer.param_groups)
        yield range(first, behind), optimizer
        first = behind


def _kinds(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in state.items()}


def _are_counts(value: Tensor) -> bool:
    return value.dtype == torch.float64 and bool(((value >= 0) & (value <= LARGEST)).all())


def _is_of_adam(state: Mapping[str, Tensor], parameter: Tensor) -> bool:
    """Whether `state` can be what Adam keeps of `parameter`: its entries, their types and shapes, counts and squares
    that are not negative."""
    if set(state) != set(OF_ADAM) or state["step"].ndim or state["step"].dtype not in (torch.float32, torch.float64):
        return False
    if any((state[name].shape, state[name].dtype) != (parameter.shape, parameter.dtype) for name in OF_ADAM[1:]):
        return False
    return 0 <= float(state["step"]) <= LARGEST and bool((state["exp_avg_sq"] >= 0).all())
