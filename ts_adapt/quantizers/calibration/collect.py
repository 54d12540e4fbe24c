"""Calibration sets: calls of a network, kept to be run again; collected along the sampling trajectory.

A `Call` is one call as it was made, by `integrate`, by a pipeline, or by hand: `Call.of(network, x_t, timestep,
encoder_hidden_states=...)`. It can be cut to some of its samples.

`collect` solves from noise and keeps some of the calls that the solver makes: `count` samples spread over the steps by

    uniform   the same number at every step
    normal    weights exp(-(u - 0.4)^2 / (2 0.4^2)), u the step's timestep between 0 (data) and 1 (noise): PTQ4DM
              (Shang et al. 2023) samples normally with the mean towards the data
    active    one sample after the other at argmax_t [H_t + 1.5 / (N_t + 1)], H_t in [0, 1] the entropy of the
              network's predictions at step t, N_t the samples already there: APQ-DM (Wang et al. 2024)

No step gives more samples than there are solves: what `normal` or `active` would take beyond, the other steps give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.denoisers.network import calling_convention, prediction_of
from ts_adapt.errors import TsAdaptError, one_line, unknown
from ts_adapt.interfaces import Condition, Denoiser, Solver, StepPolicy, TimeGrid
from ts_adapt.numerics import each_tensor
from ts_adapt.quantizers.layers.timestep import timestep_argument
from ts_adapt.sampling import integrate

SHARED = ("img_ids", "txt_ids")
"""Arguments that all samples have in common, whatever their first size."""
NORMAL_CENTRE, NORMAL_WIDTH = 0.4, 0.4
ACTIVE_WEIGHT = 1.5
ENTROPY_BINS = 64


@dataclass(frozen=True)
class Call:
    """args, kwargs  of the network's `forward`
    timestep      `(B,)` float32, what the network is told, in its own unit
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    timestep: Tensor

    @classmethod
    def of(cls, network: nn.Module, x: Tensor, timestep: Tensor, **condition: Any) -> Call:
        """The call of `network` on states `x` `(B, ...)` at `timestep` `()` or `(B,)`, by its calling convention."""
        made: list[Call] = []

        def in_its_place(*args: Any, **kwargs: Any) -> Tensor:
            made.append(cls.made(network, args, kwargs))
            return made[0].x

        times = torch.as_tensor(timestep, dtype=torch.float32).expand(x.shape[0])
        calling_convention(network)(in_its_place, x, times, condition)  # type: ignore[arg-type]
        return made[0]

    @classmethod
    def made(cls, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call of `network` with these arguments."""
        timestep = timestep_argument(network)(args, kwargs).float()
        batch = _state(args, kwargs).shape[0]
        return cls(args, dict(kwargs), timestep.expand(batch) if timestep.shape[0] == 1 else timestep)

    @property
    def batch(self) -> int:
        return self.timestep.shape[0]

    @property
    def x(self) -> Tensor:
        """The state, or its tokens, `(B, ...)`."""
        return _state(self.args, self.kwargs)

    def rows(self, index: Tensor) -> Call:
        """The call of the samples `index` alone."""

        def cut(value: Tensor) -> Tensor:
            return value[index] if value.ndim and value.shape[0] == self.batch else value

        kwargs = {name: value if name in SHARED else each_tensor(value, cut) for name, value in self.kwargs.items()}
        return Call(each_tensor(self.args, cut), kwargs, self.timestep[index])

    def run(self, network: nn.Module) -> Tensor:
        """What `network` says to it: the raw prediction `(B, ...)`, or tokens."""
        return prediction_of(network(*self.args, **self.kwargs))


def _state(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1)


def check_calls(network: nn.Module, calls: Sequence[Call]) -> None:
    """TsAdaptError unless `calls` holds samples, all of one shape, finite, that `network` takes.

    The last is found by running one sample of the first call.
    """
    if sum(call.batch for call in calls) == 0:
        raise TsAdaptError(
            "the calibration set is empty; this quantizer needs samples, collect some along the sampling trajectory"
        )
    shape = calls[0].x.shape[1:]
    for index, call in enumerate(calls):
        if call.x.shape[1:] != shape:
            raise TsAdaptError(
                f"call {index} of the calibration set has samples of shape {tuple(call.x.shape[1:])}, "
                f"the first of {tuple(shape)}; give samples of one shape"
            )
        if not bool(torch.isfinite(call.x).all()):
            raise TsAdaptError(f"call {index} of the calibration set holds a NaN or infinite value; collect it again")
    try:
        with torch.no_grad():
            calls[0].rows(torch.arange(1)).run(network)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise TsAdaptError(
            f"{type(network).__name__} does not take the calibration set's samples of shape {tuple(shape)} "
            f"({one_line(error)}); collect them with this network"
        ) from error


SELECTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "uniform": lambda u, entropy, chosen: -(chosen + 0.5),
    "normal": lambda u, entropy, chosen: (
        -(chosen + 0.5) / torch.exp(-((u - NORMAL_CENTRE) ** 2) / (2 * NORMAL_WIDTH**2))
    ),
    "active": lambda u, entropy, chosen: entropy + ACTIVE_WEIGHT / (chosen + 1),
}
"""(u, H, N) at the steps, `(T,)` each -> what one sample more of each step would gain: the largest is taken next."""


def shares(select: str, times: Tensor, entropy: Tensor, count: int, limit: int) -> Tensor:
    """How many samples each step gives, `(T,)`: `count` in all, at most `limit` of any step.

    times  `(T,)` the timesteps; entropy  `(T,)` in [0, 1]
    """
    u = (times.double() - times.min()) / (times.max() - times.min()).clamp(min=1e-12)
    chosen = torch.zeros(len(times), dtype=torch.long)
    for _ in range(count):
        gain = SELECTIONS[select](u, entropy, chosen)
        chosen[int(torch.where(chosen < limit, gain, -torch.inf).argmax())] += 1
    return chosen


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
    network = denoiser.network
    if network is None:
        raise TsAdaptError(f"{type(denoiser).__name__} has no network to quantize; give the denoiser of a network")
    if select not in SELECTIONS:
        raise unknown("selection", select, SELECTIONS)
    if len(x_T) == 0:
        raise TsAdaptError("the calibration set would be empty: there is no starting noise; give at least one")
    calls: list[Call] = []
    entropies: list[float] = []

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        calls.append(Call.made(network, args, kwargs))
        entropies.append(entropy_of(prediction_of(out)))

    handle = network.register_forward_hook(called, with_kwargs=True)
    try:
        with torch.no_grad():
            integrate(denoiser, solver, schedule, x_T, condition=condition, step_noise=step_noise)
    finally:
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
    counts = shares(select, times, torch.tensor(entropies, dtype=torch.float64), count, limit).tolist()
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
