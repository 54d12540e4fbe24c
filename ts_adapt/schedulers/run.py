"""One sampling run seen from the scheduler: `sampling.integrate` turned inside out.

    integrate                                   a pipeline's loop
    node = policy.init(x_T)                     start(x_T)          where the first call of the network shows x_T
    raw  = network(x_t, tau_node)               tell() -> tau       the network is called by the pipeline
    x0   = x0_from_raw(raw, x_t, node)          step(raw, x_t)
    advance(policy, solver, x_t, x0, node)      ... -> x_s

tau is the network's timestep, time_scale * model_time, `()` or `(B,)`. States are taken in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ts_adapt.denoisers.network import x0_from_raw
from ts_adapt.interfaces import Condition, Node, NoiseSchedule, Solver, StepPolicy, TsAdaptError
from ts_adapt.sampling import advance
from ts_adapt.schedulers.plans import Plan

View = Callable[[Tensor], Tensor]


class OnGrid:
    """`noise`, with its values at `times` `(n,)` computed once, together, and then looked up.

    Times that are not among them, differentiable ones and those of a whole batch go to `noise`.
    """

    def __init__(self, noise: NoiseSchedule, times: Tensor) -> None:
        self.noise, self.t_min, self.t_max = noise, noise.t_min, noise.t_max
        places = (noise.alpha(times), noise.sigma(times), noise.log_snr(times))
        self._places = dict(zip(times.tolist(), zip(*(values.unbind() for values in places), strict=True), strict=True))

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        if t.ndim or t.requires_grad or t.device.type != "cpu":
            return None
        return self._places.get(float(t))

    def alpha(self, t: Tensor) -> Tensor:
        known = self._at(t)
        return self.noise.alpha(t) if known is None else known[0]

    def sigma(self, t: Tensor) -> Tensor:
        known = self._at(t)
        return self.noise.sigma(t) if known is None else known[1]

    def log_snr(self, t: Tensor) -> Tensor:
        known = self._at(t)
        return self.noise.log_snr(t) if known is None else known[2]

    def time(self, log_snr: Tensor) -> Tensor:
        return self.noise.time(log_snr)


class Seen:
    """`policy`, which sees states through `view`: pictures where the pipeline has tokens."""

    def __init__(self, policy: StepPolicy, view: View) -> None:
        self.policy, self.view = policy, view

    def init(self, x_T: Tensor, condition: Condition) -> tuple[Node, Any]:
        return self.policy.init(self.view(x_T), condition)

    def next(self, x_t: Tensor, x0: Tensor, node: Node, state: Any) -> tuple[Node, Any]:
        return self.policy.next(self.view(x_t), self.view(x0), node, state)


class Run:
    """The state of one run along `plan`, which begins at place `begin` of its nominal times.

    solver, prediction, clip_x0    as in `NetworkDenoiser` and `integrate`
    time_scale                     the network's timestep for t = 1
    """

    def __init__(
        self, plan: Plan, solver: Solver, prediction: str, time_scale: float, begin: int = 0, clip_x0: bool = False
    ) -> None:
        self.plan, self.solver, self.noise, self.prediction = plan, solver, solver.noise_schedule, prediction
        self.time_scale, self.begin, self.clip_x0 = time_scale, begin, clip_x0
        self.steps = plan.times.shape[-1] - 1 - begin
        self.done = 0
        self.batch: int | None = None
        self.node: Node | None = None
        self._policy: StepPolicy | None = None
        self._copies = 1
        self._told_at = -1
        self._policy_state: Any = None
        self._memory: Any = None

    @property
    def place(self) -> int:
        """The place of the nominal times that comes next."""
        return self.begin + self.done

    @property
    def finished(self) -> bool:
        return self.done == self.steps

    def start(self, x_T: Tensor, condition: Condition, view: View | None = None, copies: int = 1) -> None:
        """Resolve the first node for the state `x_T` `(B, ...)` that the run begins with.

        view    from the pipeline's states to `(B, C, H, W)`, for the policy; None: they are that
        copies  how often the network sees each sample: twice under classifier-free guidance
        """
        predictor = self.plan.predictor
        if predictor is not None:
            seen, learned = tuple((view or _full)(x_T).shape[1:]), tuple(predictor.options["shape"])
            if seen != learned:
                raise TsAdaptError(
                    f"the predictor was learned for samples of shape {learned}, the pipeline's are {seen}; give the "
                    "height and width that it was learned for"
                )
            if predictor.static_times.device != x_T.device:
                predictor.to(x_T.device)
        policy = self.plan.policy(self.begin)
        self._policy = policy if view is None else Seen(policy, view)
        self._copies = copies
        if self.plan.own_times:
            self.batch = x_T.shape[0]
        node, self._policy_state = self._policy.init(_full(x_T), condition)
        if node.steps - node.index != self.steps:
            raise TsAdaptError(
                f"the step policy takes {node.steps - node.index} steps where {self.steps} were asked for; give "
                "nominal times of as many steps"
            )
        self.node, self._memory = node, self.solver.init(x_T)

    def tell(self) -> Tensor:
        """tau, what the network is to be told now: `()`, or `(B,)` for the B samples of the run; float32."""
        if self.node is None:
            raise TsAdaptError("the run has not started: no starting noise was seen")
        self._told_at = self.done
        time = self.node.t if self.node.model_time is None else self.node.model_time
        return (time * self.time_scale).to(torch.float32)

    def step(self, raw: Tensor, x_t: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """x_s and x0 `(rows, ...)` from what the network said.

        A pipeline that keeps both halves of classifier-free guidance gives the samples twice, and gets them twice.
        """
        if self.finished:
            raise TsAdaptError(f"all {self.steps} steps are done; call set_timesteps() before the next run")
        if self.plan.told and self._told_at != self.done:
            raise TsAdaptError(
                "this schedule has other times than the loop's timesteps and the network was not told them: use "
                "ts_adapt.attach(pipe, schedule), or scheduler.network_timesteps(sample) in a loop of your own"
            )
        if self.node is None:
            self.start(x_t, {})
        assert self.node is not None and self._policy is not None
        rows = x_t.shape[0]
        if self.batch is None:
            self.batch = rows
        copies = self._copies if rows == self._copies * self.batch else 1
        if rows != copies * self.batch:
            raise TsAdaptError(
                f"the run began with {self.batch} samples and step {self.done} has {rows}; keep the batch, or call "
                "set_timesteps() for a new one"
            )
        x = _full(x_t)
        if copies > 1:
            x, raw = x[: self.batch], raw[: self.batch]
        if noise is not None:
            noise = noise[: self.batch].to(x)
        x0 = x0_from_raw(raw, x, self.node.t, self.noise, self.prediction, self.node.output_scale)
        x0 = x0.clamp(-1, 1) if self.clip_x0 else x0
        x_s, self.node, self._policy_state, self._memory = advance(
            self._policy, self.solver, x, x0, self.node, self._policy_state, self._memory, noise
        )
        self.done += 1
        if copies > 1:
            x_s, x0 = (torch.cat([value] * copies) for value in (x_s, x0))
        return x_s.to(x_t.dtype), x0.to(x_t.dtype)


def _full(x: Tensor) -> Tensor:
    """`x` in float32 at least."""
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
