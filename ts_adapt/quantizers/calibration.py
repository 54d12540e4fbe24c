"""Calibration sets along the sampling trajectory, and what the layers receive on them.

`collect` solves from noise and keeps some of the calls that the solver makes: `count` samples spread over the steps by

    uniform   the same number at every step
    normal    weights exp(-(u - 0.4)^2 / (2 0.4^2)), u the step's timestep between 0 (data) and 1 (noise): PTQ4DM
              (Shang et al. 2023) samples normally with the mean towards the data
    active    one sample after the other at argmax_t [H_t + 1.5 / (N_t + 1)], H_t in [0, 1] the entropy of the
              network's predictions at step t, N_t the samples already there: APQ-DM (Wang et al. 2024)

No step gives more samples than there are solves: what `normal` or `active` would take beyond, the other steps give.

`observe` runs a calibration set and shows a visitor the input of each layer; `record_inputs` keeps its range by time,
and some of its values: their ranks are cut into strata, which grow geometrically from both ends; the middle value of
each is kept, and how many it stands for. So extremes are kept one by one, and count as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.interfaces import Condition, Denoiser, Solver, StepPolicy, TimeGrid, TsAdaptError, unknown
from ts_adapt.quantizers.calls import Call, prediction_of
from ts_adapt.sampling import integrate

NORMAL_CENTRE, NORMAL_WIDTH = 0.4, 0.4
ACTIVE_WEIGHT = 1.5
ENTROPY_BINS = 64
Visit = Callable[[str, Tensor, Tensor], None]
"""(layer's name, its input, the timestep `(B,)` of its call)."""


def select_uniform(times: Tensor, entropy: Tensor, count: int, limit: int) -> Tensor:
    return _shares(torch.ones(len(times), dtype=torch.float64), count, limit)


def select_normal(times: Tensor, entropy: Tensor, count: int, limit: int) -> Tensor:
    u = (times.double() - times.min()) / (times.max() - times.min()).clamp(min=1e-12)
    return _shares(torch.exp(-((u - NORMAL_CENTRE) ** 2) / (2 * NORMAL_WIDTH**2)), count, limit)


def select_active(times: Tensor, entropy: Tensor, count: int, limit: int) -> Tensor:
    """Steps of equal entropy are all met once before any is met twice."""
    chosen = torch.zeros(len(times), dtype=torch.long)
    for _ in range(count):
        gain = entropy + ACTIVE_WEIGHT / (chosen + 1)
        chosen[int(torch.where(chosen < limit, gain, -torch.inf).argmax())] += 1
    return chosen


SELECTIONS: dict[str, Callable[[Tensor, Tensor, int, int], Tensor]] = {
    "uniform": select_uniform,
    "normal": select_normal,
    "active": select_active,
}
"""(timesteps `(T,)`, entropies `(T,)` in [0, 1], count, limit) -> how many samples each step gives, `(T,)`: `count` in
all, at most `limit` of any step."""


def _shares(weights: Tensor, count: int, limit: int) -> Tensor:
    """`count` in whole parts nearly proportional to `weights`: one by one to the step that is the furthest behind."""
    parts = torch.zeros(len(weights), dtype=torch.long)
    for _ in range(count):
        parts[int(torch.where(parts < limit, (parts + 0.5) / weights, torch.inf).argmin())] += 1
    return parts


def collect(
    denoiser: Denoiser,
    solver: Solver,
    schedule: StepPolicy | TimeGrid | Tensor,
    x_T: Tensor,
    *,
    condition: Condition | None = None,
    select: str = "uniform",
    count: int | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
) -> list[Call]:
    """The calls that a solve from `x_T` `(B, ...)` makes of the denoiser's network, cut to `count` samples in all.

    count   None: every sample at every step; else at most B of any step, different samples at different steps
    Raises TsAdaptError for a denoiser without a network, an unknown selection, no noise, or too large a count.
    """
    network = getattr(denoiser, "network", None)
    if not isinstance(network, nn.Module):
        raise TsAdaptError(f"{type(denoiser).__name__} has no network to quantize; give the denoiser of a network")
    if select not in SELECTIONS:
        raise unknown("selection", select, SELECTIONS)
    if len(x_T) == 0:
        raise TsAdaptError("the calibration set would be empty: there is no starting noise; give at least one")
    calls: list[Call] = []
    entropies: list[float] = []

    def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call.made(network, args, kwargs))

    def left(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        entropies.append(entropy_of(prediction_of(out)))

    handles = [network.register_forward_pre_hook(entered, with_kwargs=True), network.register_forward_hook(left)]
    try:
        with torch.no_grad():
            integrate(denoiser, solver, schedule, x_T, condition=condition, step_noise=step_noise)
    finally:
        for handle in handles:
            handle.remove()
    if count is None:
        return calls
    times = torch.stack([call.timestep.mean() for call in calls]).cpu()
    limit = calls[0].batch
    if not 0 < count <= limit * len(calls):
        raise TsAdaptError(
            f"count is {count}; {limit} solves of {len(calls)} evaluations give between 1 and {limit * len(calls)} "
            "samples, give more noises or another count"
        )
    counts = SELECTIONS[select](times, torch.tensor(entropies, dtype=torch.float64), count, limit).tolist()
    kept, start = [], 0
    for call, n in zip(calls, counts, strict=True):
        if n:
            kept.append(call.rows((torch.arange(n) + start) % call.batch))
        start += n
    return kept


def entropy_of(x: Tensor) -> float:
    """The entropy of the values of `x` in ENTROPY_BINS bins of [-3, 3], as a share of the largest possible."""
    counts = torch.histc(x.detach().float().cpu().clamp(-3, 3), ENTROPY_BINS, -3, 3)
    p = counts / counts.sum()
    return float(-(p * p.clamp(min=1e-12).log()).sum()) / math.log(ENTROPY_BINS)


def observe(network: nn.Module, names: Iterable[str], calls: Sequence[Call], visit: Visit) -> None:
    """Run `calls` and show `visit` the input of every layer of `names`, each time that it is called."""
    now: list[Tensor] = []

    def listener(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: visit(name, args[0].detach(), now[0])

    handles = [network.get_submodule(name).register_forward_pre_hook(listener(name)) for name in names]
    try:
        with torch.no_grad():
            for call in calls:
                now[:] = [call.timestep]
                call.run(network)
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class InputRecord:
    """What a layer receives, by timestep, in rising order. T timesteps, C input channels.

    times     `(T,)`
    low, high, mean, std   `(T,)` of all values
    channel_bound          `(T, C)` the largest absolute value of each input channel
    values, weights        T tensors each: some of the values, the smallest and the largest among them, and how many of
                           all each stands for
    """

    times: Tensor
    low: Tensor
    high: Tensor
    mean: Tensor
    std: Tensor
    channel_bound: Tensor
    values: list[Tensor]
    weights: list[Tensor]

    @property
    def all_values(self) -> Tensor:
        return torch.cat(self.values)

    @property
    def all_weights(self) -> Tensor:
        return torch.cat(self.weights)

    def rows(self, most: int) -> tuple[Tensor, Tensor]:
        """At most `most` values of each timestep, and their weights: both `(T, n)`; what fills a row up weighs 0."""
        kept = [condensed(*of_time, most) for of_time in zip(self.values, self.weights, strict=True)]
        n = max(len(values) for values, _ in kept)
        return (
            torch.stack([torch.cat([values, values[-1:].expand(n - len(values))]) for values, _ in kept]),
            torch.stack([nn.functional.pad(weights, (0, n - len(weights))) for _, weights in kept]),
        )


def strata(count: int, most: int) -> Tensor:
    """Where `count` ranks are cut into at most `most` strata: `(n + 1,)`, from 0 to `count`. Half of the cuts are even,
    the others geometric from both ends."""
    if count <= most:
        return torch.arange(count + 1)
    near = torch.logspace(0, math.log10(count / 2), most // 4, dtype=torch.float64)
    even = torch.linspace(0, count, most // 2 + 1, dtype=torch.float64)
    edges: Tensor = torch.cat([near, count - near, even, even.new_tensor([count])]).round().long().unique()
    return edges


def condensed(values: Tensor, weights: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """At most `most` of the `values` `(n,)`, in rising order, with the `weights` of all that each stands for."""
    values, order = values.sort()
    edges = strata(len(values), most).to(values.device)
    mass = nn.functional.pad(weights[order].double().cumsum(0), (1, 0))
    return values[(edges[:-1] + edges[1:] - 1) // 2], mass[edges].diff().float()


def channel_dim(x: Tensor) -> int:
    """Where the input channels of a layer are: 1 of pictures `(B, C, H, W)`, the last of tokens `(B, ..., C)`."""
    return 1 if x.ndim == 4 else -1


class Recorder:
    """Gathers `InputRecord`s: `visit` is shown tensors `(n, ...)` by name, with the timesteps `(B,)` of their call, n a
    multiple of B; at most `keep` values of a name at a timestep in a call."""

    def __init__(self, keep: int = 2048) -> None:
        self.keep = keep
        self.seen: dict[str, dict[float, list[tuple[Tensor, Tensor, Tensor]]]] = {}

    def visit(self, name: str, x: Tensor, timestep: Tensor) -> None:
        for time in timestep.unique().tolist():
            rows = x[(timestep == time).repeat_interleave(x.shape[0] // timestep.shape[0])].float()
            bound = rows.abs().movedim(channel_dim(rows), 0).flatten(1).amax(1)
            flat = rows.flatten()
            stats = torch.stack(
                [flat.amin(), flat.amax(), flat.sum(), flat.square().sum(), flat.new_tensor(flat.numel())]
            )
            values, weights = condensed(flat, torch.ones_like(flat), self.keep)
            found = torch.cat([stats.double(), bound.double()]).cpu(), values.cpu(), weights.cpu()
            self.seen.setdefault(name, {}).setdefault(time, []).append(found)

    def records(self, names: Iterable[str]) -> dict[str, InputRecord]:
        """The records of `names`; TsAdaptError, naming them, if some were never seen."""
        names = list(names)
        unreached = [name for name in names if name not in self.seen]
        if unreached:
            raise TsAdaptError(
                f"the calibration set does not reach {', '.join(sorted(unreached))}; add samples, or skip"
            )
        return {name: _record(self.seen[name]) for name in names}


def record_inputs(
    network: nn.Module, names: Iterable[str], calls: Sequence[Call], *, keep: int = 2048
) -> dict[str, InputRecord]:
    """The record of each layer of `names` on `calls`; TsAdaptError, naming them, if some are not reached."""
    names, recorder = list(names), Recorder(keep)
    observe(network, names, calls, recorder.visit)
    return recorder.records(names)


def _record(by_time: dict[float, list[tuple[Tensor, Tensor, Tensor]]]) -> InputRecord:
    times = sorted(by_time)
    rows = [torch.stack([stats for stats, _, _ in by_time[time]]) for time in times]
    total = torch.stack([row[:, 2:5].sum(0) for row in rows])
    mean = total[:, 0] / total[:, 2]
    return InputRecord(
        times=torch.tensor(times),
        low=torch.stack([row[:, 0].amin() for row in rows]).float(),
        high=torch.stack([row[:, 1].amax() for row in rows]).float(),
        mean=mean.float(),
        std=(total[:, 1] / total[:, 2] - mean**2).clamp(min=0).sqrt().float(),
        channel_bound=torch.stack([row[:, 5:].amax(0) for row in rows]).float(),
        values=[torch.cat([values for _, values, _ in by_time[time]]) for time in times],
        weights=[torch.cat([weights for _, _, weights in by_time[time]]) for time in times],
    )
