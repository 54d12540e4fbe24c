"""Step policies: who decides the next time.

`FollowGrid` walks a grid known before the solve: a fixed one, a learned static one, or one grid per sample.
`FromNoise` asks a function of the starting noise for the grid, once (one-shot schedules).
`StepByStep` asks a function of the state for each next time, while sampling (recursive schedules).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Condition, Node, NoiseSchedule, Nominal, StepPolicy, TimeGrid
from ts_adapt.numerics import check_rows, validate_grid


class FollowGrid:
    """Walks `grid`, from node `first` on; `(B, N+1)` times give each sample its own.

    Times outside `noise_schedule`, where given, are refused.
    """

    def __init__(self, grid: TimeGrid | Tensor, noise_schedule: NoiseSchedule | None = None, *, first: int = 0) -> None:
        self.grid, self.first = validate_grid(grid, noise_schedule), first

    @property
    def nominal(self) -> Tensor:
        """The times themselves, or the mean of the grids of all samples."""
        return self.grid.times.mean(0) if self.grid.per_sample else self.grid.times

    def rows(self, rows: slice) -> FollowGrid:
        """The policy of some samples."""
        return FollowGrid(self.grid.rows(rows), first=self.first)

    def init(self, x_T: Tensor, condition: Condition) -> tuple[Node, TimeGrid]:
        check_rows(self.grid, x_T.shape[0])
        return self.grid.node(self.first), self.grid

    def next(self, x_t: Tensor, x0: Tensor, node: Node, state: TimeGrid) -> tuple[Node, TimeGrid]:
        return state.node(node.index + 1), state


@dataclass(frozen=True)
class Around:
    """A policy around `policy`, whose times stand for its own in a pipeline's loop; a subclass says what it does."""

    policy: StepPolicy

    @property
    def nominal(self) -> Tensor | None:
        return self.policy.nominal if isinstance(self.policy, Nominal) else None


class FromNoise:
    """One-shot: `grid_of(x_T, condition)` -> the grids of the batch, resolved once, at the start.

    nominal  `(N+1,)`, the times that stand for them in a pipeline's loop; None: it is in none
    """

    def __init__(self, grid_of: Callable[[Tensor, Condition], TimeGrid], nominal: Tensor | None = None) -> None:
        self.grid_of, self.nominal = grid_of, nominal

    def init(self, x_T: Tensor, condition: Condition) -> tuple[Node, TimeGrid]:
        return FollowGrid(self.grid_of(x_T, condition)).init(x_T, condition)

    def next(self, x_t: Tensor, x0: Tensor, node: Node, state: TimeGrid) -> tuple[Node, TimeGrid]:
        return state.node(node.index + 1), state


class StepByStep:
    """Recursive: `next_node(x_t, x0, node, condition)` -> the next place of evaluation.

    `first` is the node at pure noise, or a later one where the solve starts inside. Each next one has the index after
    it, a smaller time and finite corrections, up to index `steps`; raises TsAdaptError otherwise. `nominal` as of
    `FromNoise`.
    """

    def __init__(
        self, first: Node, next_node: Callable[[Tensor, Tensor, Node, Condition], Node], nominal: Tensor | None = None
    ) -> None:
        self.first, self.next_node, self.nominal = first, next_node, nominal

    def init(self, x_T: Tensor, condition: Condition) -> tuple[Node, Any]:
        return self.first, condition

    def next(self, x_t: Tensor, x0: Tensor, node: Node, state: Any) -> tuple[Node, Any]:
        found = self.next_node(x_t, x0, node, state)
        if found.index != node.index + 1:
            raise TsAdaptError(f"after step {node.index} the policy went to {found.index}; expected {node.index + 1}")
        check_next(node, found)
        return found, state


def check_next(node: Node, after: Node) -> None:
    """TsAdaptError unless time falls in every sample from `node` to the one `after` it, and corrections are finite."""
    falls, finite = (after.t < node.t).all(), _finite(after)
    if bool(torch.stack([falls, *finite.values()]).all()):  # one look at the device for all of it
        return
    if not bool(falls):
        raise TsAdaptError(
            f"after step {node.index} the policy's time does not fall in every sample; times fall strictly, "
            "from noise to data"
        )
    raise _not_finite(finite, f"after step {node.index}")


def check_first(node: Node) -> None:
    """TsAdaptError unless the corrections of a policy's first `node` are finite."""
    finite = _finite(node)
    if finite and not bool(torch.stack([*finite.values()]).all()):
        raise _not_finite(finite, "at the start")


def _finite(node: Node) -> dict[str, Tensor]:
    """Whether all of each correction of `node` is finite, by its name there."""
    return {field.at: torch.isfinite(value.float()).all() for field, value in node.held.items()}


def _not_finite(finite: dict[str, Tensor], when: str) -> TsAdaptError:
    bad = next(name for name, fine in finite.items() if not bool(fine))
    return TsAdaptError(f"{when} the policy's {bad} holds a NaN or infinite value")


def as_policy(schedule: StepPolicy | TimeGrid | Tensor, noise_schedule: NoiseSchedule | None = None) -> StepPolicy:
    """A grid becomes `FollowGrid`, refused if it leaves the time range of `noise_schedule`; a policy passes."""
    if isinstance(schedule, (TimeGrid, Tensor)):
        return FollowGrid(schedule, noise_schedule)
    if isinstance(schedule, StepPolicy):
        return schedule
    raise TsAdaptError(f"a schedule is a TimeGrid, a tensor of times or a step policy; got {type(schedule).__name__}")
