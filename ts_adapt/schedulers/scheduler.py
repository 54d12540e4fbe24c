"""A scheduler of diffusers on learned times: `LearnedScheduler`.

    x0  = x0 from the network's prediction at the true time of each sample
    x_s = Solver.update(x_t, x0, node, next node)              the same solvers as `sampling.integrate`

`timesteps` are the nominal times of a pipeline's loop: real numbers in the network's unit, neither rounded nor shifted.
Where samples have times of their own, or the network is to be told others, `attach` sees to it; `step` goes by its
own index and never by the timestep it is given. Nothing is clipped unless `clip_x0` says so, whatever the `clip_sample`
of the pipeline's former scheduler.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ts_adapt.assembly import build_solver, solver_name
from ts_adapt.interfaces import MAX_STEPS, Condition, Solver, TsAdaptError
from ts_adapt.noise import RectifiedFlow
from ts_adapt.schedulers import storage
from ts_adapt.schedulers.building import Constructors
from ts_adapt.schedulers.noise_config import NoiseOfConfig, differences, noise_config, read_noise
from ts_adapt.schedulers.plans import Plan, Predictor, given_plan, stands_for_number
from ts_adapt.schedulers.run import OnGrid, Run, Shown
from ts_adapt.schedulers.sources import Chosen, Predictors, Source, source_of


@dataclass
class LearnedSchedulerOutput(BaseOutput):
    """prev_sample           x_s `(B, ...)`, the next input of the network
    pred_original_sample  x0 `(B, ...)`, for previews
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class LearnedScheduler(Constructors, NoiseOfConfig, SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Times that are fixed, learned, predicted from noise or while sampling, with a solver of one evaluation a step.

    num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr, prediction_type
                as in diffusers; prediction_type "flow_prediction" is a rectified flow, which has no betas.
                beta_schedule None: those of the pipeline, when attached
    solver      a name that `assembly.build_solver` knows; Heun, with two evaluations a step, is refused
    grid        a fixed family of grids, by a name that `assembly.build_grid` knows; "uniform" where nothing is given
    grids       learned grids by their number of steps: {"5": {"times": [...], "model_times": ..., "output_scale": ...,
                "coefficients": ...}}, in between interpolated in log-SNR
    predictors  the numbers of steps that predictors were learned for, [5, 10], or [[5, 10]] for one that serves both;
                their weights come with `from_pretrained`
    learned_for what is known of where it was learned: model, teacher, distance, ...; carried along
    clip_x0     clamp x0 to [-1, 1]

    Most schedules are made by `from_grid`, `from_schedules`, `from_predictors`, `from_policy` or `from_pretrained`.
    `from_config(pipe.scheduler.config, grid=..., solver=...)` takes over betas and prediction type.
    """

    _compatibles = [*(kind.name for kind in KarrasDiffusionSchedulers), "FlowMatchEulerDiscreteScheduler"]  # noqa: RUF012
    order = 1

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str | None = "linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        solver: str = "unipc-2",
        grid: str | None = None,
        grids: Mapping[str, Any] | None = None,
        predictors: Sequence[int | Sequence[int]] | None = None,
        learned_for: Mapping[str, Any] | None = None,
        clip_x0: bool = False,
    ) -> None:
        if not isinstance(solver, str):
            raise TsAdaptError(f"solver is {solver!r}; expected a solver's name, such as 'unipc-2'")
        if not isinstance(clip_x0, bool) or not isinstance(learned_for, Mapping | None):
            raise TsAdaptError(
                f"clip_x0 is {clip_x0!r} and learned_for {learned_for!r}; expected true or false, and an object"
            )
        self.register_to_config(solver=solver_name(solver))
        self._noise = read_noise(self.config)
        self._refuse_stages()
        self.source: Source = source_of(grid, grids, predictors, self._noise and self._noise[0])
        self.run: Run | None = None
        self._kept: dict[int, tuple[Plan, Solver]] = {}
        self.timesteps = torch.empty(0)
        self.num_inference_steps: int | None = None

    def _refuse_stages(self) -> None:
        solver = build_solver(self.config["solver"], self._noise[0] if self._noise else RectifiedFlow())
        if solver.evaluations_per_step != 1:
            raise TsAdaptError(
                f"{type(solver).__name__} evaluates the network {solver.evaluations_per_step} times a step, and a "
                "pipeline's loop does so once; choose a solver of one evaluation, such as unipc-3 or dpmpp-2m"
            )

    def use_predictors(self, given: Mapping[int, Predictor]) -> None:
        """Take the weights of the predictors that the config names; TsAdaptError where they are for another noise."""
        for steps, predictor in given.items():
            found = differences((predictor.noise, self.prediction), (self.noise, self.prediction))
            if found:
                raise TsAdaptError(f"the predictor for {steps} steps was learned with another noise: {found[0]}")
        self.source = Predictors(tuple(given), {steps: p.eval() for steps, p in given.items()})
        self._kept.clear()

    # -- files -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers; from another scheduler's config betas and prediction type are taken over."""
        if not isinstance(config, Mapping):
            raise TsAdaptError(
                f"from_config takes a config, such as pipe.scheduler.config; got {type(config).__name__}, and "
                "from_pretrained reads files"
            )
        if "learned_for" not in config:
            kwargs = {**noise_config(config), **kwargs}
        return super().from_config(dict(config), return_unused_kwargs, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The schedule in a folder, or in a repository of the Hugging Face hub; JSON and safetensors only.

        As in diffusers: `revision`, `cache_dir`, `token`, `local_files_only`, ... for the hub; other arguments replace
        those of the config. Raises TsAdaptError for files that are missing, damaged or of another kind.
        """
        folder, kwargs = storage.find(pretrained_model_name_or_path, subfolder, kwargs)
        config = storage.read_config(folder, cls.__name__)
        schedule = cls.from_config(config, return_unused_kwargs=True, **kwargs)[0]
        if schedule.config["predictors"] is not None:
            schedule.use_predictors(storage.read_predictors(folder, schedule.config["predictors"], schedule.noise))
        unused = {key: value for key, value in kwargs.items() if key not in schedule.config}
        return (schedule, unused) if return_unused_kwargs else schedule

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """`scheduler_config.json`; for predictors `model.safetensors` and `config.json` too, in `nfe<N>` if several."""
        if isinstance(self.source, Chosen):
            raise TsAdaptError("a schedule from a step policy cannot be saved; save what the policy is made from")
        folder = storage.folder_for(save_directory)
        if isinstance(self.source, Predictors):
            about = {"solver": self.config["solver"], **(self.config["learned_for"] or {})}
            storage.write_predictors(folder, self.source, about)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    # -- a run -----------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Settle the times of the next run.

        num_inference_steps  N, which is also the NFE
        timesteps            N real times of evaluation, in the network's unit, in place of the schedule's own
        sigmas               the same by edm_sigma, or by t for a rectified flow, a 0 at the end or not. 1, 1 - 1/N ..
                             1/N, which Flux gives by default, stand for their number
        mu                   ignored, like the `shift` of a config: learned times are absolute

        Given times end in t_min, where nothing is evaluated. Raises TsAdaptError for a number of steps that was not
        learned, or is not that of the given times, and for times given to a schedule that chooses them by itself.
        """
        plan, solver = self._settled(num_inference_steps, timesteps, sigmas)
        self.num_inference_steps = plan.steps
        self.timesteps = (plan.times[:-1] * self.time_scale).to(device=device, dtype=torch.float32)
        self._begin(plan, solver, 0)

    def _settled(self, steps: Any, timesteps: Any, sigmas: Any) -> tuple[Plan, Solver]:
        """The plan and a solver that knows its places; those of a number of steps are kept."""
        if timesteps is None and stands_for_number(sigmas, self.noise):
            steps, sigmas = len(sigmas), None
        if timesteps is None and sigmas is None:
            count = _whole(steps)
            if count is None or not 1 <= count <= MAX_STEPS:
                raise TsAdaptError(f"num_inference_steps is {steps!r}; expected a whole number from 1 to {MAX_STEPS}")
            if count not in self._kept:
                self._kept[count] = self._with_solver(self.source.plan(count, self.noise))
            return self._kept[count]
        if self.source.own_times:
            raise TsAdaptError(
                "this schedule chooses the times of each image by itself; leave timesteps and sigmas out, or attach a "
                "fixed grid"
            )
        plan = given_plan(timesteps, sigmas, self.noise, self.time_scale)
        if steps is not None and steps != plan.steps:
            raise TsAdaptError(
                f"num_inference_steps is {steps!r} and the times given are those of {plan.steps} steps; leave "
                "num_inference_steps out"
            )
        return self._with_solver(plan)

    def _with_solver(self, plan: Plan) -> tuple[Plan, Solver]:
        return plan, build_solver(self.config["solver"], OnGrid(self.noise, plan.times))

    def _begin(self, plan: Plan, solver: Solver, begin: int) -> None:
        clip_x0 = self.config["clip_x0"]
        self.run = Run(plan, solver, self.prediction, self.time_scale, begin=begin, clip_x0=clip_x0)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the run at a later place of the timesteps (img2img).

        Raises TsAdaptError for one-shot schedules, which see pure noise only, and where nothing is left to do.
        """
        run, begin = self._running("set_begin_index"), _whole(begin_index)
        if begin == run.begin:
            return
        if run.node is not None:
            raise TsAdaptError("the run has begun; call set_begin_index() before its first step")
        if not run.plan.inside:
            raise TsAdaptError(
                "this schedule is found from the pure noise at the start and cannot begin inside, as img2img does; use "
                "a static or a recursive one, or strength=1"
            )
        if begin is None or not 0 <= begin < len(self.timesteps):
            raise TsAdaptError(
                f"the run would begin at place {begin_index!r} of {len(self.timesteps)} steps and do nothing; raise "
                "strength or num_inference_steps"
            )
        self._begin(run.plan, run.solver, begin)

    @property
    def begin_index(self) -> int | None:
        return None if self.run is None else self.run.begin

    @property
    def step_index(self) -> int | None:
        """The place of `timesteps` that comes next."""
        return None if self.run is None else self.run.place

    def _running(self, method: str) -> Run:
        if self.run is None:
            raise TsAdaptError(f"{method}() was called before set_timesteps(num_inference_steps); call that first")
        return self.run

    def network_timesteps(self, sample: Tensor, condition: Condition | None = None) -> Tensor:
        """What to tell the network about `sample` `(B, ...)` now, `(B,)` float32; for loops without a pipeline."""
        run = self._running("network_timesteps")
        if run.finished:
            raise TsAdaptError("all steps are done; call set_timesteps() before the next run")
        if run.node is None:
            run.start(Shown(sample, dict(condition or {})))
        return run.tell(sample.shape[0]).to(sample.device)

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
        """One step of the solver from `sample` `(B, ...)`, which the network answered with `model_output`.

        `timestep` is not read. `generator` draws the noise of stochastic solvers (ddpm). Computed in float32 at least,
        returned in the sample's precision. Raises TsAdaptError before `set_timesteps`, after the last step, for another
        batch size than the run began with, and for `eta` or clipping, which are the solver's and `clip_x0`'s.
        """
        run = self._running("step")
        if eta or use_clipped_model_output:
            raise TsAdaptError(
                "eta and use_clipped_model_output are diffusers' DDIM's; here solver='ddpm' draws noise, clip_x0 clips"
            )
        noise = None
        if run.solver.needs_noise:
            shape = sample.shape
            noise = randn_tensor(shape, generator=generator, device=sample.device, dtype=model_output.dtype)
        x_s, x0 = run.step(model_output, sample, noise)
        return LearnedSchedulerOutput(x_s, x0) if return_dict else (x_s, x0)


def _whole(number: Any) -> int | None:
    """`number`, of whatever library, if it is a whole one."""
    try:
        return None if isinstance(number, bool) else operator.index(number)
    except TypeError:
        return None
