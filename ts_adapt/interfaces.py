"""The package's interfaces: what a denoiser, a solver, a step policy, a distance must offer.

Forward process `x_t = alpha_t x_0 + sigma_t eps`; `log_snr` is the *half* log-SNR `lambda_t = log(alpha_t / sigma_t)`,
strictly decreasing in t. A denoiser returns `x0 = E[x_0 | x_t]`. Shapes: B is the batch, `...` the data dimensions;
a time is `()` when the batch shares it and `(B,)` when every sample has its own. Times are float64; everything is
differentiable in the times. Imports torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

DERIVATIVES = ("exact", "slow", "secant")
"""How the derivative in the time told to a network is taken: `denoisers.time_derivative`."""
DERIVATIVE_WIDTH = 0.04
"""The share of all times over which it is a mean: 40 of 1000 timesteps."""
Condition = Mapping[str, Any]
"""Keyword arguments of a denoiser beside the state and the time: class labels, prompt embeddings, ..."""
MAX_STEPS = 10_000
"""Of a time grid that is asked for, or read from a file."""


@runtime_checkable
class NoiseSchedule(Protocol):
    """alpha and sigma as functions of continuous time; never a time grid.

    Every method maps a tensor of any shape to the same shape, in float64, differentiably. `t_max` is the time of pure
    noise, `t_min` that of data (`t_min < t_max`). `log_snr` may be infinite at either end. A class derived from this
    one has what follows `time` already, as it is for most noise schedules.
    """

    @property
    def t_min(self) -> float: ...

    @property
    def t_max(self) -> float: ...

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda_t = log(alpha_t / sigma_t), strictly decreasing."""
        ...

    def time(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`."""
        ...

    def __repr__(self) -> str:
        return f"{type(self).__name__}(t from {self.t_max:g} to {self.t_min:g})"

    @property
    def t_end(self) -> float:
        """Where a last step may end at the latest: t_min, or a time beyond it at which sigma is 0."""
        return self.t_min

    @property
    def reaches_0(self) -> bool:
        """Whether sigma is 0 at t_end."""
        return bool(torch.isinf(self.log_snr(torch.tensor(self.t_end, dtype=torch.float64))))

    @property
    def time_scale(self) -> float:
        """The network's timestep for t = 1: at t it is told time_scale * t, unless `timestep` says otherwise."""
        return 1.0

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is told at t."""
        return self.time_scale * t.to(torch.float64)

    def time_of_timestep(self, timestep: Tensor) -> Tensor:
        """The inverse of `timestep`."""
        return timestep.to(torch.float64) / self.time_scale

    @property
    def data_std(self) -> float | None:
        """d of a network that is shown x_t / sqrt((alpha d)^2 + sigma^2) and predicts x0 / d; None: x_t and x0."""
        return None

    @property
    def noise_scale(self) -> float:
        """The standard deviation of x_T for data of unit variance: sqrt(alpha^2 + sigma^2) at t_max."""
        t = torch.tensor(self.t_max, dtype=torch.float64)
        return float((self.alpha(t).square() + self.sigma(t).square()).sqrt())

    def reach(self, t: Tensor, share: float) -> Tensor:
        """How far two times about t are apart between which lies the `share` of all times as the network knows them."""
        return torch.full_like(t, share * (self.t_max - self.t_min))

    def at_share(self, share: Tensor) -> Tensor:
        """The time below which lies the `share` of all times as the network knows them; `reach` is its slope."""
        return self.t_min + share * (self.t_max - self.t_min)

    def program_sigma(self, t: Tensor) -> Tensor:
        """What other programs call sigma at t: sigma_t / alpha_t for networks that were not trained as flows."""
        return torch.exp(-self.log_snr(t))

    def time_of_program_sigma(self, sigma: Tensor) -> Tensor:
        """The inverse of `program_sigma`."""
        return self.time(-torch.log(sigma.to(torch.float64)))


@runtime_checkable
class Denoiser(Protocol):
    """x0 = E[x_0 | x_t]. A class derived from this one has what follows `shape` already.

    evaluations     each call is one evaluation of every sample of the batch
    noise_schedule  alpha and sigma of its times
    shape           of a sample, without the batch
    network         the module inside: what is cached, quantized and pruned; None: there is none
    prediction      what the network predicts: epsilon, sample, v or velocity; None: it is not known
    clip_x0         whether x0 is clamped to [-1, 1]
    null_condition  the condition that stands for "none", which guidance needs; None: there is none
    encode          prompts -> their condition, tensors `(B, ...)` by name; None: it takes no prompts
    decoder         from the space of the diffusion to images in [-1, 1]; None: the identity
    scheduler_config  of the pipeline's scheduler in diffusers; None: it is in no pipeline
    loop            runs a whole solve in place of `sampling.integrate`'s, and calls take `embedding`; None: it has none
    parts           other modules that a solve depends on, by name
    alone           whether it takes one sample at a time: `sampling.integrate` solves for one after the other
    loop_times_only  why its network can be told only the times of its loop; empty: it can be told any
    guides          whether a call takes `guidance_factor` `()` or `(B,)` too, which multiplies its guidance scale
    guidance_scale  what samples are guided by; None: by nothing, or it is not known
    other_scales    further scales of a pipeline's call, by the names of its arguments
    numbered        what identifies the list that each sample takes one thing of, by the `number` in its condition, such
                    as pictures to start from, or what is drawn for it, by its `seed` too; None: it has neither
    """

    evaluations: int
    noise_schedule: NoiseSchedule
    shape: tuple[int, ...]
    network: nn.Module | None = None
    prediction: str | None = None
    clip_x0: bool = False
    null_condition: Condition | None = None
    encode: Callable[[Sequence[str]], Condition] | None = None
    decoder: Callable[[Tensor], Tensor] | None = None
    scheduler_config: Mapping[str, Any] | None = None
    loop: Loop | None = None
    parts: Mapping[str, nn.Module] = MappingProxyType({})
    numbered: str | None = None
    alone: bool = False
    loop_times_only: str = ""
    guides: bool = False
    guidance_scale: float | None = None
    other_scales: Mapping[str, float] = MappingProxyType({})

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        *,
        model_time: Tensor | None = None,
        output_scale: Tensor | None = None,
        **condition: Any,
    ) -> Tensor:
        """The clean sample predicted from `x_t` `(B, ...)` at `t` `()` or `(B,)`.

        `model_time` (same unit and shape as t) is told to the network in place of t; `output_scale` `()` or `(B,)`
        multiplies the network's raw prediction before it is converted to x0.
        """
        ...

    def __repr__(self) -> str:
        predicts = f", predicts {self.prediction}" if self.prediction else ""
        return f"{type(self).__name__}(shape {tuple(self.shape)}{predicts}, {self.noise_schedule!r})"

    def timestep(self, time: Tensor, x: Tensor) -> Tensor:
        """What the network is told at `time` `()` or `(B,)`: `(B,)` float32 beside `x` `(B, ...)`."""
        told = self.noise_schedule.timestep(time)
        return told.to(device=x.device, dtype=torch.float32).expand(len(x))

    @property
    def step_aware(self) -> tuple[StepAware, ...]:
        """What is attached to the network and has to know the step; `sampling.integrate` tells it."""
        return ()

    def shown(self, x: Tensor, condition: Condition) -> tuple[Tensor, Condition]:
        """What a step policy is shown of states `x` `(B, ...)` and of their condition: `(B, C, H, W)`, and by name."""
        return x, condition

    def decode(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """Images in [-1, 1] from states `x` `(B, ...)` at the end of a solve under `condition`."""
        return x if self.decoder is None else self.decoder(x)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move network and decoder to a device, a precision, or both; returns the denoiser itself."""
        for module in (self.network, self.decoder):
            if isinstance(module, nn.Module):
                module.to(device=device, dtype=dtype)
        return self

    def draw(self, count: int, seed: int) -> Tensor | None:
        """`count` exact samples of the data, `(count, *shape)`, a function of `seed`; None: its law is not known."""
        return None


@dataclass(frozen=True)
class Field:
    """Where a correction is kept: something that travels with a grid, one value a step.

    name  what it is called in a TimeGrid, in files and in messages
    at    what one step's value is called in a Node
    dims  of one step's value for one sample: 0, a number; 1, several; 3, a picture
    ends  whether a node has the value of the step that ends there; else that of its own evaluation
    """

    name: str
    at: str
    dims: int = 0
    ends: bool = False


MODEL_TIMES = Field("model_times", "model_time")
OUTPUT_SCALE = Field("output_scale", "output_scale")
COEFFICIENTS = Field("coefficients", "coefficients", dims=1, ends=True)
HISTORY = Field("history", "history", dims=1, ends=True)
GUIDANCE = Field("guidance", "guidance_factor")
EMBEDDING = Field("embedding", "embedding", dims=1)
START, RESIDUAL = (Field(name, name, dims=3, ends=True) for name in ("start", "residual"))
"""In no grid, of a sample's shape: the change of x_T, once the network has seen it, and of the x0 of each step."""


@dataclass(frozen=True, repr=False)
class TimeGrid:
    """Where the evaluations of a few-step solve are placed, with the corrections that travel along.

    times         `(N+1,)` or `(B, N+1)`, float64, strictly decreasing: t_0 > t_1 > ... > t_N
    model_times   `(N,)` or `(B, N)`: the times told to the network at t_0 .. t_{N-1}; None: the times themselves
    output_scale  `(N,)` or `(B, N)`: factors on the network's predictions; None: ones
    coefficients  `(N, K)` or `(B, N, K)`: additive corrections to the solver's coefficients in the step from t_i to
                  t_{i+1}; None: zeros
    others        corrections besides these, each by its field: `(N, ...)` or `(B, N, ...)`
    """

    times: Tensor
    model_times: Tensor | None = None
    output_scale: Tensor | None = None
    coefficients: Tensor | None = None
    others: Mapping[Field, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, times: Tensor, held: Mapping[Field, Tensor]) -> TimeGrid:
        """The grid of `times` with the corrections `held`; see `held`."""
        return cls(times, *_own_and_others(held))

    def __repr__(self) -> str:
        count = "" if self.own_rows is None else f" for each of {self.own_rows} samples"
        shown = self.times.flatten()[: self.times.shape[-1]].tolist()
        times = ", ".join(f"{t:.4g}" for t in shown) if self.times.ndim == 1 else f"{shown[0]:.4g} to {shown[-1]:.4g}"
        return f"TimeGrid({'; '.join([f'{self.steps} steps{count}: {times}', *self.corrections])})"

    @property
    def steps(self) -> int:
        return self.times.shape[-1] - 1

    @property
    def per_sample(self) -> bool:
        return self.times.ndim == 2

    @property
    def own_rows(self) -> int | None:
        """How many samples have times, or corrections, of their own; None: all of it is shared."""
        own = [self.times] if self.per_sample else []
        own += [value for field, value in self.held.items() if value.ndim > 1 + field.dims]
        return len(own[0]) if own else None

    @cached_property
    def held(self) -> dict[Field, Tensor]:
        """The corrections that the grid has, by field."""
        return _held(self.model_times, self.output_scale, self.coefficients, self.others)

    @property
    def corrections(self) -> dict[str, Tensor]:
        """The corrections that the grid has, by name."""
        return {field.name: value for field, value in self.held.items()}

    def mapped(self, change: Callable[[Tensor, int], Tensor]) -> TimeGrid:
        """The grid of `change(value, dims)` of its times and corrections; dims are those of a value that all share."""
        held = {field: change(value, 1 + field.dims) for field, value in self.held.items()}
        return TimeGrid.of(change(self.times, 1), held)

    def rows(self, index: slice | Tensor | Sequence[int]) -> TimeGrid:
        """The grids of some samples; what is shared by the batch stays as it is."""
        return self.mapped(lambda value, dims: value[index] if value.ndim > dims else value)

    def node(self, index: int) -> Node:
        """The place of the `index`-th evaluation; index N is the end, where nothing is evaluated."""
        steps, places = self.steps, ((kept, value, index - kept.ends) for kept, value in self.held.items())
        found = {kept: value.select(-1 - kept.dims, place) for kept, value, place in places if 0 <= place < steps}
        return Node.of(index, steps, self.times[..., index], found)


@dataclass(frozen=True)
class Node:
    """One place of evaluation: the `index`-th of `steps` (index == steps is the end of the solve).

    t             `()` or `(B,)`, float64
    model_time    as in TimeGrid, at this place; None: t
    output_scale  as in TimeGrid, at this place; None: one
    coefficients  `(K,)` or `(B, K)`: as in TimeGrid, of the step that ends here, so that whoever chooses where to go
                  chooses them too, with the x0 just computed at hand; None: zeros
    others        as in TimeGrid: `(...)` or `(B, ...)`
    """

    index: int
    steps: int
    t: Tensor
    model_time: Tensor | None = None
    output_scale: Tensor | None = None
    coefficients: Tensor | None = None
    others: Mapping[Field, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, index: int, steps: int, t: Tensor, held: Mapping[Field, Tensor]) -> Node:
        """The node at `t` with the corrections `held`; see `held`."""
        return cls(index, steps, t, *_own_and_others(held)) if held else cls(index, steps, t)

    @cached_property
    def held(self) -> dict[Field, Tensor]:
        """The corrections that the node has, by field."""
        return _held(self.model_time, self.output_scale, self.coefficients, self.others)


def _held(
    model: Tensor | None, output: Tensor | None, coefficients: Tensor | None, others: Mapping[Field, Tensor]
) -> dict[Field, Tensor]:
    own = ((MODEL_TIMES, model), (OUTPUT_SCALE, output), (COEFFICIENTS, coefficients))
    return {**{field: value for field, value in own if value is not None}, **others}


def _own_and_others(
    held: Mapping[Field, Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, dict[Field, Tensor]]:
    own = (MODEL_TIMES, OUTPUT_SCALE, COEFFICIENTS)
    others = {field: value for field, value in held.items() if field not in own}
    return held.get(MODEL_TIMES), held.get(OUTPUT_SCALE), held.get(COEFFICIENTS), others


@runtime_checkable
class StepPolicy(Protocol):
    """Decides where the next evaluation is. Fixed, learned, one-shot and recursive schedules differ here alone.

    The policy's state is explicit and returned; what it is, is the policy's own affair.
    """

    def init(self, x_T: Tensor, condition: Condition) -> tuple[Node, Any]:
        """The first node (index 0) for the starting noise `x_T` `(B, ...)`."""
        ...

    def next(self, x_t: Tensor, x0: Tensor, node: Node, state: Any) -> tuple[Node, Any]:
        """The node after `node`, given the (uncorrected) state and the x0 just computed there."""
        ...


@runtime_checkable
class Solver(Protocol):
    """One step of the probability-flow ODE from the x0 values met so far. Pure: memory is handed in and returned.

    order                 of convergence
    evaluations_per_step  1, or more for single-step methods such as Heun (these have `step`, not `update`)
    needs_noise           whether `update` draws on `noise` (stochastic solvers)
    """

    @property
    def noise_schedule(self) -> NoiseSchedule: ...

    @property
    def order(self) -> int: ...

    @property
    def evaluations_per_step(self) -> int: ...

    @property
    def needs_noise(self) -> bool: ...

    def init(self, x: Tensor) -> Any:
        """The memory before the first step."""
        ...

    def update(
        self, x_t: Tensor, x0: Tensor, node: Node, next_node: Node, memory: Any, noise: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """x_s at `next_node.t` from x_t and x0 at `node.t`; all of shape `(B, ...)`."""
        ...


Advance = Callable[..., tuple[Tensor, Node, Any, Any]]
"""(policy, solver, x_t, x0, node, policy's state, solver's memory) -> x_s, its node, both: `sampling.advance`."""
Around = Callable[[Callable[[Tensor], Tensor], Tensor, float | None], Tensor]
"""(evaluate, told, divisor) -> what the network answers: how one call of it is made inside a loop.

`evaluate` is the call as a function of the time that the network is told, `told`, which is the timestep of t divided by
`divisor` for each row of its batch; divisor None: in another way, or shape.
"""


class Loop(Protocol):
    """A loop of a denoiser's own: `sampling.integrate` runs it once for a whole solve."""

    def __call__(
        self,
        solver: Solver,
        policy: StepPolicy,
        x_T: Tensor,
        condition: Condition,
        advance: Advance,
        *,
        checkpoint: bool = False,
        around: Around | None = None,
    ) -> None:
        """Solve from `x_T` `(B, ...)`, calling `advance`, which keeps what comes of it, after each evaluation.

        checkpoint  recompute the network in the backward pass
        around      how it is called; None: simply
        """
        ...


@runtime_checkable
class Nominal(Protocol):
    """A step policy that can be followed in a loop which wants its times before it has a sample.

    nominal  `(N+1,)`: the times that stand for those of every sample there; None: it is in no such loop
    """

    @property
    def nominal(self) -> Tensor | None: ...


@runtime_checkable
class ByRows(Protocol):
    """A step policy that has something of each sample's own before the solve begins."""

    def rows(self, rows: slice) -> StepPolicy:
        """The policy of these samples."""
        ...


@runtime_checkable
class StepAware(Protocol):
    """Something inside the network that has to know the step: a cacher.

    runs  how many have begun
    """

    runs: int

    def begin(self, steps: int, batch: int) -> None:
        """A run of `steps` steps for `batch` samples begins; the network may see them twice, guided."""
        ...

    def at(self, index: int | None) -> None:
        """The calls of the network that follow belong to step `index`, from 0; None: to none, for the time being."""
        ...

    def end(self) -> None:
        """The run is over, or was broken off; calls of the network that follow belong to none."""
        ...


@runtime_checkable
class Distance(Protocol):
    """A per-sample distance between images in [-1, 1]: `(B, ...), (B, ...) -> (B,)`."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor: ...
