"""The scheduler that a pipeline's loop runs on while it is learned on: each run is a solve, or a part of one.

    set_timesteps      begins the run that `prepare` was given, whatever else is asked for
    step               takes a step of it; the last one leaves the pipeline's call, by an exception of its own

Otherwise it is a `LearnedScheduler`, attached by `attach`: what is learned is what will be sampled with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Advance, Solver
from ts_adapt.schedulers.plan import Plan
from ts_adapt.schedulers.run import Run
from ts_adapt.schedulers.scheduler import LearnedScheduler, LearnedSchedulerOutput


class Left(BaseException):
    """The loop is left: all that was wanted of it is there. No `Exception`, which a pipeline might catch."""


@dataclass(frozen=True)
class Prepared:
    """A run to come.

    plan, solver  as of any run
    advance       what follows an evaluation
    start         what it begins with in place of what the pipeline has drawn, `(B, ...)`; None: the pipeline's
    leave         whether its last step leaves the loop
    asked         how many steps the pipeline is asked for
    """

    plan: Plan
    solver: Solver
    advance: Advance
    start: Tensor | None = None
    leave: bool = True
    asked: int = 1

    def __deepcopy__(self, memo: Any) -> Prepared:
        raise TsAdaptError(
            "the loop runs copies of its scheduler, each with steps of its own, and what is learned is a single solve; "
            "learn on a pipeline without views or sound, and attach the schedule"
        )


class StudentScheduler(LearnedScheduler):
    """See the module's head; one run at a time."""

    init_noise_sigma = 1.0
    """Starting noise is given in its full size."""
    _prepared: Prepared | None = None

    def prepare(self, run: Prepared) -> None:
        """Let `run` be the next one."""
        self._forget_runs()
        self._prepared = run

    def forget(self) -> None:
        """End the run: what it told the step is told that it is over."""
        self.end()
        self._forget_runs()
        self._prepared = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Begin the run that was prepared; TsAdaptError if there is none, or another number of steps is asked for."""
        if self._prepared is None:
            raise TsAdaptError("this scheduler belongs to a denoiser, which runs its pipeline; load another pipeline")
        plan, given = self._prepared.plan, sigmas if timesteps is None else timesteps
        asked = num_inference_steps if given is None else len(given)
        if asked != self._prepared.asked:
            raise TsAdaptError(f"the pipeline asks for {asked} steps where it was called for {self._prepared.asked}")
        self.num_inference_steps = plan.steps
        self.timesteps = self.noise_schedule.timestep(plan.times[:-1]).to(device=device, dtype=torch.float32)
        self._begin(plan, self._prepared.solver)

    def _begin(self, plan: Plan, solver: Solver, begin: int | None = None) -> None:
        assert self._prepared is not None
        advance, clips = self._prepared.advance, self.config["clip_x0"]
        self.run = Run(plan, self.timesteps, solver, self.prediction, begin, clips, advance)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """As that of a `LearnedScheduler`, of what the run begins with at its start."""
        return super().scale_model_input(self._begun(sample), timestep)

    def _begun(self, sample: Tensor) -> Tensor:
        """The sample itself; at the start what the run begins with, as often as the pipeline has its samples, before
        the channels that it has beside them."""
        start = None if self._prepared is None else self._prepared.start
        if start is None or self.run is None or self.run.done:
            return sample
        begun = torch.cat([start.to(sample)] * max(1, len(sample) // len(start)))
        return torch.cat([begun, sample[:, begun.shape[1] :]], 1) if begun.ndim > 1 else begun

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        return_dict: bool = True,
    ) -> LearnedSchedulerOutput | tuple[Tensor, ...]:
        """As that of a `LearnedScheduler`; the noise of a stochastic solver is the solve's. Raises Left."""
        sample = self._begun(sample)
        if sample._is_view():  # of what the loop may write the next state into
            sample = sample.clone()
        out = super().step(model_output, timestep, sample, generator, eta, use_clipped_model_output, return_dict)
        if self._running("step").finished and self._prepared is not None and self._prepared.leave:
            raise Left
        return out
