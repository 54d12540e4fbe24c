"""What a network is told: a forward pre-hook that gives each row of a pipeline's call its own time.

    rows    of the network's batch: the samples, twice under classifier-free guidance: [x, x]
    tau     (B,) from the run -> (rows,), tiled; divided by 1000 where the pipeline divides its timestep

A call is one of the loop's if its timestep is the loop's next one, as such or divided by 1000, to the precision of half
floats; any other use of the network is left alone. Timesteps that a pipeline has rounded to its own precision are
replaced by those in float32.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ts_adapt.interfaces import TsAdaptError
from ts_adapt.schedulers.run import Run, View
from ts_adapt.schedulers.scheduler import LearnedScheduler

DIVISORS = (1, 1000)
HALF_PRECISION = 2.0**-7
"""How far a timestep may be off, relatively, and still be meant: the rounding of bfloat16."""
CONDITIONS = ("class_labels", "encoder_hidden_states", "pooled_projections")
"""The arguments of a network that a predictor may look at."""


class TimeHook:
    """The pre-hook of the network of `pipe`, for as long as its scheduler is `schedule`."""

    def __init__(self, pipe: Any, schedule: LearnedScheduler, network: nn.Module) -> None:
        self.pipe, self.schedule = pipe, schedule
        self.names = argument_names(network)
        self.place = self.names.index("timestep")
        self.null_class = getattr(getattr(network, "config", None), "num_embeds_ada_norm", None)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self.schedule.run
        if self.pipe.scheduler is not self.schedule or run is None or run.finished:
            return None
        timestep = args[self.place] if self.place < len(args) else kwargs.get("timestep")
        exact = not isinstance(timestep, Tensor) or timestep.dtype in (torch.float32, torch.float64)
        if timestep is None or (exact and not run.plan.told):
            return None
        divisor = self._divisor(timestep, run)
        if divisor is None:
            return None
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        x = given[self.names[0]]
        if run.node is None:
            self._start(run, x, given)
        tau = run.tell().to(x.device) / divisor
        if tau.ndim:
            if x.shape[0] % tau.shape[0]:
                raise TsAdaptError(
                    f"the run began with {tau.shape[0]} samples and the network is called with {x.shape[0]}; keep the "
                    "batch, or call set_timesteps() for a new one"
                )
            tau = tau.repeat(x.shape[0] // tau.shape[0])
        tau = tau.expand(x.shape[0])
        if self.place < len(args):
            return (*args[: self.place], tau, *args[self.place + 1 :]), kwargs
        return args, {**kwargs, "timestep": tau}

    def _divisor(self, timestep: Any, run: Run) -> int | None:
        """What the pipeline has divided the loop's timestep by; None where it is another timestep."""
        nominal = float(run.plan.times[run.place]) * run.time_scale
        value = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        close = (d for d in DIVISORS if abs(value * d - nominal) <= HALF_PRECISION * abs(nominal))
        return next(close, None)

    def _start(self, run: Run, x: Tensor, given: dict[str, Any]) -> None:
        rows, copies, conditional_first = x.shape[0], 1, False
        if run.plan.own_times and rows % 2 == 0:
            copies, conditional_first = self._guidance(x, given)
        batch = rows // copies
        own = slice(0, batch) if conditional_first else slice(rows - batch, rows)
        condition = {
            name: value[own]
            for name in CONDITIONS
            if isinstance(value := given.get(name), Tensor) and value.ndim and value.shape[0] == rows
        }
        run.start(x[:batch], condition, _view(given), copies)

    def _guidance(self, x: Tensor, given: dict[str, Any]) -> tuple[int, bool]:
        """How often each sample is in the batch, and whether its conditional half comes first (DiT)."""
        guided = getattr(self.pipe, "do_classifier_free_guidance", None)
        labels = given.get("class_labels")
        by_class = False
        if guided is None and self.null_class is not None and isinstance(labels, Tensor):
            guided = by_class = bool((labels.chunk(2)[1] == self.null_class).all())
        if guided is False or not torch.equal(*x.chunk(2)):
            return 1, False
        return 2, by_class


def argument_names(network: nn.Module) -> list[str]:
    """The names of the arguments of the network's forward: the state's, then the others."""
    forward: Any = type(getattr(network, "_orig_mod", network)).forward  # type: ignore[attr-defined]
    return list(inspect.signature(forward).parameters)[1:]


def _view(given: dict[str, Any]) -> View | None:
    """From Flux's tokens `(B, HW/4, 4C)` to `(B, C, H, W)`, by the rows and columns in `img_ids`; None for pictures."""
    positions = given.get("img_ids")
    if not isinstance(positions, Tensor):
        return None
    last = positions.reshape(-1, positions.shape[-1])[-1]
    rows, columns = int(last[1]) + 1, int(last[2]) + 1

    def view(x: Tensor) -> Tensor:
        if x.shape[1] != rows * columns:
            raise TsAdaptError(
                f"the pipeline's {x.shape[1]} tokens are no picture of {rows} x {columns}; use a schedule that does "
                "not look at the sample"
            )
        return F.pixel_shuffle(x.transpose(1, 2).reshape(x.shape[0], x.shape[2], rows, columns), 2)

    return view
