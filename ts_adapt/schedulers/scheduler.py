"""A scheduler of diffusers on learned times: `LearnedScheduler`.

    x0  = x0 from the network's prediction at the true time of each sample
    x_s = Solver.update(x_t, x0, node, next node)              the same solvers as `sampling.integrate`

`timesteps` are the nominal times of a pipeline's loop: real numbers in the network's unit, neither rounded nor shifted.
Where samples have times of their own, or the network is to be told others, `attach` sees to it; of the timestep that
`step` is given only the place in the run is taken. Nothing is clipped unless `clip_x0` says so, whatever the
`clip_sample` of the pipeline's former scheduler.
"""

from __future__ import annotations

import copy
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
from ts_adapt.denoisers.scheduler_config import FLOW, UNKNOWN, Noise, differences, noise_config, noise_of
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Condition, NoiseSchedule, Solver, StepPolicy, TimeGrid
from ts_adapt.noise import OnGrid, RectifiedFlow
from ts_adapt.numerics import combine
from ts_adapt.schedulers import storage
from ts_adapt.schedulers.plan import LISTS, Plan, Predictor, Source, as_grid, whole
from ts_adapt.schedulers.run import Run, Shown, cannot_begin_inside, in_full
from ts_adapt.schedules.file import LearnedGrid, in_common
from ts_adapt.solvers.coefficients import check_end


@dataclass
class LearnedSchedulerOutput(BaseOutput):
    """prev_sample           x_s `(B, ...)`, the next input of the network
    pred_original_sample  x0 `(B, ...)`, for previews
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class LearnedScheduler(SchedulerMixin, ConfigMixin):
    """Times that are fixed, learned, predicted from noise or while sampling, with a solver of one evaluation a step.

    num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr, snr_shift_scale,
    prediction_type, sigma_min, sigma_max, sigma_data
                as in diffusers; prediction_type "flow_prediction" is a rectified flow, and with a sigma_data it is
                EDM's noise: these have no betas. beta_schedule None: those of the pipeline, when attached
    sigma_told  how EDM's networks are told sigma, "log" or "arctan"
    solver      a name that `assembly.build_solver` knows; Heun, with two evaluations a step, is refused
    grid        a fixed family of grids, by a name that `schedules.resolve.build_grid` knows; None: "uniform"
    grids       learned grids by their number of steps: {"5": {"times": [...], "model_times": ..., "output_scale": ...,
                "coefficients": ..., "history": ..., "guidance": ...}}; for other numbers interpolated in log-SNR, with
                a warning
    predictors  the numbers of steps that predictors were learned for, [5, 10], or [[5, 10]] for one that serves
                both, and those between with a warning; their weights come with `from_pretrained`
    learned_for what is known of where it was learned: model, teacher, distance, ...; carried along
    clip_x0     clamp x0 to [-1, 1]

    Most schedules are made by `from_grid`, `from_schedules`, `from_predictors`, `from_policy` or `from_pretrained`,
    where `config` is that of the pipeline's scheduler and further options are those above, or by
    `from_config(pipe.scheduler.config, grid=..., solver=...)`.
    """

    __module__ = "ts_adapt"  # what a saved pipeline says to import, which is light and known by that name
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
        snr_shift_scale: float = 1.0,
        prediction_type: str = "epsilon",
        solver: str = "unipc-2",
        grid: str | None = None,
        grids: Mapping[str, Any] | None = None,
        predictors: Sequence[int | Sequence[int]] | None = None,
        learned_for: Mapping[str, Any] | None = None,
        clip_x0: bool = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sigma_data: float | None = None,
        sigma_told: str = "log",
    ) -> None:
        if not isinstance(solver, str):
            raise TsAdaptError(f"solver is {solver!r}; expected a solver's name, such as 'unipc-2'")
        if not isinstance(clip_x0, bool) or not isinstance(learned_for, Mapping | None):
            raise TsAdaptError(
                f"clip_x0 is {clip_x0!r} and learned_for {learned_for!r}; expected true or false, and an object"
            )
        self.register_to_config(solver=solver_name(solver))
        self.known_noise = self._read_noise()
        """The noise schedule and the prediction; None where a pipeline has still to give them."""
        made = build_solver(self.config["solver"], self.known_noise[0] if self.known_noise else RectifiedFlow())
        if made.evaluations_per_step != 1:
            raise TsAdaptError(
                f"{type(made).__name__} evaluates the network {made.evaluations_per_step} times a step, and a "
                "pipeline's loop does so once; choose a solver of one evaluation, such as unipc-3 or dpmpp-2m"
            )
        self.source: Source = storage.source_of(grid, grids, predictors, self.known_noise and self.known_noise[0])
        self._forget_runs()

    lists = LISTS
    """The lists of times that are taken as such: attached, those that the pipeline's call takes."""

    continues = False
    """Whether runs may go on from where another pipeline's ended, as those with `denoising_start` do."""

    def _forget_runs(self) -> None:
        self.run: Run | None = None
        self.timesteps = torch.empty(0)
        self.num_inference_steps: int | None = None

    # -- the ways to a schedule ------------------------------------------------------------------------------------

    @classmethod
    def from_grid(
        cls,
        grid: str | TimeGrid | Tensor,
        solver: str = "unipc-2",
        config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """From a fixed grid: a family's name, or times `(N+1,)`, or `(B, N+1)` with one grid for each image of a batch.

        A family may do without `config` and takes over that of the pipeline it is attached to.
        """
        if isinstance(grid, str):
            known = UNKNOWN if config is None else _required(config, "a family of grids")
            return cls(**known, solver=solver, grid=grid, **options)
        found = as_grid(grid)
        grids = storage.grids_to_json({found.steps: found})
        return cls(**_required(config, "a grid of times"), solver=solver, grids=grids, **options)

    @classmethod
    def from_schedules(
        cls, schedules: LearnedGrid | Sequence[LearnedGrid], config: Mapping[str, Any], **options: Any
    ) -> Any:
        """From learned static schedules for one model and solver, each for another NFE."""
        found = _all_of(schedules, LearnedGrid, "from_schedules", "learned schedules, which LearnedGrid.load reads")
        solvers, steps = {s.solver for s in found}, [s.grid.steps for s in found]
        if len(solvers) > 1 or len(set(steps)) < len(steps):
            raise TsAdaptError(
                f"schedules in one file share a solver and differ in NFE; these have {', '.join(sorted(solvers))} "
                f"and NFE {', '.join(map(str, steps))}"
            )
        options = {"learned_for": in_common(s.about for s in found), "solver": found[0].solver, **options}
        grids = storage.grids_to_json({s.grid.steps: s.grid for s in found})
        return cls(**_required(config, "a learned schedule"), grids=grids, **options)

    @classmethod
    def from_predictors(
        cls, predictors: Predictor | Sequence[Predictor], solver: str, config: Mapping[str, Any], **options: Any
    ) -> Any:
        """From predictors of one kind (`load_predictor` reads them), each for other NFEs."""
        found = _all_of(predictors, Predictor, "from_predictors", "predictors, which load_predictor reads")
        found.sort(key=lambda predictor: predictor.learned[0])
        given = {steps: predictor for predictor in found for steps in predictor.learned}
        if len(given) < sum(len(predictor.learned) for predictor in found):
            raise TsAdaptError("two of the predictors are for the same NFE; give one for each")
        served = [list(p.learned) if len(p.learned) > 1 else p.learned[0] for p in found]
        schedule = cls(**_required(config, "a predictor"), solver=solver, predictors=served, **options)
        schedule.use_predictors(given)
        return schedule

    @classmethod
    def from_policy(
        cls, policy: StepPolicy, times: Tensor, solver: str, config: Mapping[str, Any], **options: Any
    ) -> Any:
        """From any step policy; `times` `(N+1,)` are the nominal ones of the loop. It cannot be saved."""
        if not isinstance(policy, StepPolicy):
            raise TsAdaptError(f"a step policy has init and next; got {type(policy).__name__}, which has not")
        schedule = cls(**_required(config, "a step policy"), solver=solver, **options)
        plan = Plan.of_policy(policy, as_grid(times, schedule.noise_schedule).times)
        schedule.source = Source(plans={plan.steps: plan})
        return schedule

    def use_predictors(self, given: Mapping[int, Predictor]) -> None:
        """Take the weights of the predictors that the config names; TsAdaptError where they are for another noise."""
        for steps, predictor in given.items():
            found = differences((predictor.noise_schedule, self.prediction), (self.noise_schedule, self.prediction))
            if found:
                raise TsAdaptError(f"the predictor for {steps} steps was learned with another noise: {found[0]}")
        self.source = Source.of_predictors({steps: p.eval() for steps, p in given.items()})

    def copy_for(self, config: Mapping[str, Any] | None = None) -> Any:
        """A copy of the schedule, with no run begun.

        config  of another scheduler, whose noise schedule and prediction type the copy takes over; the times stay

        Raises TsAdaptError where the times do not run over that noise schedule.
        """
        other = copy.copy(self)
        other._forget_runs()
        if config is None:
            return other
        taken = noise_config(config)
        left = [key for key in self.config.get("_use_default_values", []) if key not in taken]
        other.register_to_config(**taken, _use_default_values=left)
        other.known_noise = other._read_noise()
        old, new = self.known_noise and self.known_noise[0], other.noise_schedule
        if old is not None and (old.t_min, old.t_max) != (new.t_min, new.t_max):
            raise TsAdaptError(
                f"the schedule's times run from {old.t_max:g} to {old.t_min:g}, the pipeline's from {new.t_max:g} "
                f"to {new.t_min:g}: they mean other noise there; learn one for this pipeline"
            )
        return other

    # -- files -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers; from another scheduler's config noise schedule and prediction type are taken over."""
        if not isinstance(config, Mapping):
            raise TsAdaptError(
                f"from_config takes a config, such as pipe.scheduler.config; got {type(config).__name__}, and "
                "from_pretrained reads files"
            )
        if "learned_for" not in config:
            kwargs = {**noise_config(config), **kwargs}
        return super().from_config(dict(config), return_unused_kwargs, **kwargs)

    @classmethod
    def from_pretrained(
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
        schedule, _ = cls.from_config(storage.read_config(folder, cls.__name__), return_unused_kwargs=True, **kwargs)
        if (predictors := schedule.config["predictors"]) is not None:
            schedule.use_predictors(storage.read_predictors(folder, predictors, schedule.noise_schedule))
        unused = {key: value for key, value in kwargs.items() if key not in schedule.config}
        return (schedule, unused) if return_unused_kwargs else schedule

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """`scheduler_config.json`; for predictors `model.safetensors` and `config.json` too, in `nfe<N>` if several."""
        plans = self.source.plans.values()
        if any(plan is not None and plan.grid is None and plan.predictor is None for plan in plans):
            raise TsAdaptError("a schedule from a step policy cannot be saved; save what the policy is made from")
        folder = storage.folder_for(save_directory)
        if self.config["predictors"] is not None:
            about = {"solver": self.config["solver"], **(self.config["learned_for"] or {})}
            storage.write_predictors(folder, self.source, about)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    # -- the noise schedule ----------------------------------------------------------------------------------------

    def _read_noise(self) -> Noise | None:
        kind, betas = self.config["prediction_type"], [self.config[key] for key in ("beta_schedule", "trained_betas")]
        return None if kind != FLOW and betas == [None, None] else noise_of(self.config, type(self).__name__)

    @property
    def noise_schedule(self) -> NoiseSchedule:
        return self._known()[0]

    @property
    def prediction(self) -> str:
        """What the network predicts, in the words of `parameterization`."""
        return self._known()[1]

    def _known(self) -> Noise:
        if self.known_noise is None:
            raise TsAdaptError(
                "this grid has no noise schedule yet; attach it to a pipeline, or pass config=pipe.scheduler.config"
            )
        return self.known_noise

    @property
    def init_noise_sigma(self) -> float:
        """What standard normal noise is multiplied by: 1 for beta tables and rectified flow, for EDM's sigma_max."""
        return self.noise_schedule.noise_scale

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma noise at `timesteps` `()` or `(B,)`, in the network's unit, real or whole.

        Where a run is to begin there and each sample has times of its own, each is noised to its own.
        """
        at, own = self.noise_schedule, None if self.run is None else self.run.noised_to(timesteps, len(noise))
        t = at.time_of_timestep(torch.as_tensor(timesteps)) if own is None else own
        t = t.clamp(at.t_min, at.t_max)
        x, eps = in_full(original_samples.expand_as(noise)), in_full(noise.to(original_samples.device))
        return combine((at.alpha(t), x), (at.sigma(t), eps)).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` in the order of arguments of diffusers' flow-matching schedulers."""
        return self.add_noise(sample, noise, timestep)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the network is shown of `sample` x_t = alpha x0 + sigma eps `(rows, ...)`, rows as in `Run`.

        It is x_t itself but for EDM's networks, which see it in the unit of its variance: of the next step, or of that
        which `timestep` says.
        """
        if self.known_noise is None or self.known_noise[0].data_std is None:
            return sample
        return self._running("scale_model_input").show(sample, timestep)

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

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
        sigmas               the same by edm_sigma, or by t for a rectified flow, a 0 at the end or not
        mu                   ignored, like the `shift` of a config: learned times are absolute

        Given times end in t_min, where nothing is evaluated, or behind a sigma of t_min in 0 if that is reached. Lists
        that a pipeline gives where its user has not stand for their number: those of `plan.usual_lists`, and any that
        the user cannot give (`lists`). Raises TsAdaptError for a number of steps that the schedule does not serve, or
        is not that of the given times, for times given to a schedule that chooses them by itself, and where the solver
        cannot step to their end.
        """
        self.end()
        plan = self.source.asked(num_inference_steps, timesteps, sigmas, self.noise_schedule, self.lists)
        solver = build_solver(self.config["solver"], OnGrid(self.noise_schedule, plan.times))
        check_end(solver, plan.times[-1])
        self.num_inference_steps = plan.steps
        self.timesteps = self.noise_schedule.timestep(plan.times[:-1]).to(device=device, dtype=torch.float32)
        self._begin(plan, solver)

    def end(self) -> None:
        """End the run, should it have been broken off, for what is told its steps."""
        if self.run is not None:
            self.run.end()

    def _begin(self, plan: Plan, solver: Solver, begin: int | None = None) -> None:
        self.run = Run(plan, self.timesteps, solver, self.prediction, begin, self.config["clip_x0"])
        self.run.noised = not self.continues
        known = self.config["learned_for"] or {}
        self.run.learned_at, self.run.learned_under = known.get("shape"), known.get("guidance_scale")

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the run at a later place of the timesteps (img2img).

        Raises TsAdaptError for one-shot schedules, which see pure noise only, and where nothing is left to do.
        """
        run, begin = self._running("set_begin_index"), whole(begin_index)
        if run.node is not None:
            if begin == run.begin:
                return
            raise TsAdaptError("the run has begun; call set_begin_index() before its first step")
        if begin != 0 and not run.plan.inside:
            raise cannot_begin_inside()
        if begin is None or not 0 <= begin < len(self.timesteps):
            raise TsAdaptError(
                f"the run would begin at place {begin_index!r} of {len(self.timesteps)} steps and do nothing; raise "
                "strength or num_inference_steps"
            )
        self._begin(run.plan, run.solver, begin)

    @property
    def sigmas(self) -> Tensor:
        """The nominal times and their end as other programs' sigmas `(N+1,)`: edm_sigma, or t for a rectified flow."""
        return self.noise_schedule.program_sigma(self._running("sigmas").plan.times).float()

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

    def network_timesteps(self, sample: Tensor, condition: Condition | None = None, timestep: Any = None) -> Tensor:
        """What to tell the network about `sample` `(B, ...)` now, `(B,)` float32; for loops without a pipeline.

        timestep  the loop's, where that does not begin with the first of `timesteps`; None: the next
        """
        run = self._running("network_timesteps")
        if timestep is not None or run.finished:
            run.arrive(timestep, sample)
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

        `timestep` is the one of `timesteps` that comes next; the first step may be given any, and the run begins there.
        `generator` draws the noise of stochastic solvers (ddpm). Computed in float32 at least, returned in the sample's
        precision. Raises TsAdaptError before `set_timesteps`, after the last step, for a timestep that is not the next,
        for another batch size than the run began with, and for `eta` or clipping, which are the solver's and
        `clip_x0`'s.
        """
        run = self._running("step")
        if eta or use_clipped_model_output:
            raise TsAdaptError(
                "eta and use_clipped_model_output are diffusers' DDIM's; here solver='ddpm' draws noise, clip_x0 clips"
            )
        noise = None
        if run.solver.needs_noise:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=model_output.dtype)
        x_s, x0 = run.step(model_output, timestep, sample, noise)
        return LearnedSchedulerOutput(x_s, x0) if return_dict else (x_s, x0)


def _all_of(given: Any, kind: Any, method: str, what: str) -> list[Any]:
    """`given`, one or several of `kind`, as a list; TsAdaptError for anything else."""
    found = list(given) if isinstance(given, list | tuple) else [given]
    if not found or not all(isinstance(one, kind) for one in found):
        names = ", ".join(type(one).__name__ for one in found) or "none"
        raise TsAdaptError(f"{method} takes at least one of {what}; got {names}")
    return found


def _required(config: Mapping[str, Any] | None, what: str) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        raise TsAdaptError(f"{what} belongs to a noise schedule; pass config=pipe.scheduler.config")
    return noise_config(config)
