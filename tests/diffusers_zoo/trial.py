"""A pipeline on a fixed grid of ours, against the same pipeline on the same grid by a scheduler of diffusers.

Where the two agree the grid is honoured. The oracle is diffusers' own Euler or DDIM, but for its grid, which is
`FLOW_TIMES` or `BETA_TIMES` whatever a pipeline asks for; ours is the solver `ddim` on the same times.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from diffusers_zoo.building import NotBuilt, pipeline, put
from diffusers_zoo.calling import WORDS, arguments, called
from diffusers_zoo.others import others
from diffusers_zoo.stand_ins import picture
from ts_adapt.assembly import build_solver
from ts_adapt.denoisers.pipeline import from_pipeline, is_direct
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.fixed import make
from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import TimeGrid
from ts_adapt.pipelines.arguments import OURS
from ts_adapt.pipelines.denoiser import PipelineDenoiser
from ts_adapt.pipelines.draws import OwnDraws, drawn_alike
from ts_adapt.sampling import condition_rows, initial_noise, integrate
from ts_adapt.schedulers.attach import attach, detach
from ts_adapt.schedulers.scheduler import LearnedScheduler

FLOW_TIMES = (1.0, 0.8, 0.45, 0.2, 0.0)
LEARNED_STEPS, LEARNED_ALIKE = 3, 1e-5
BETA_TIMES = (999.0, 749.0, 499.0, 249.0, 0.0)
EDM_TIMES = (80.0, 20.0, 4.0, 0.5, 0.002)


def oracle(scheduler: Any) -> Any:
    """A scheduler of diffusers on the grid of `ours`, whatever it is asked for; `NotBuilt` where there is none.

    It is of diffusers' own class, as some pipelines ask for that.
    """
    if is_flow(scheduler):
        made = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift=1.0, use_dynamic_shifting=False)
    elif "beta_schedule" in scheduler.config:
        kind = CogVideoXDDIMScheduler if "CogVideoX" in type(scheduler).__name__ else DDIMScheduler
        made = kind.from_config(
            scheduler.config, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
        )  # fmt: skip
    else:
        raise NotBuilt(f"no oracle for {type(scheduler).__name__}")

    made.set_timesteps = MethodType(_set_timesteps, made)
    made.register_to_config(variance_type=None)  # a learned variance is for pipelines to cut off
    return made


def _set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None):  # type: ignore[no-untyped-def]
    """Of a scheduler that is none, but for its grid; bound to it, so that copies have their own."""
    if is_flow(self):
        self.sigmas = torch.tensor(FLOW_TIMES)
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device)
        self._step_index = self._begin_index = None
    else:
        self.timesteps = torch.tensor(BETA_TIMES[:-1]).long().to(device)
    self.num_inference_steps = len(self.timesteps)


def is_flow(scheduler: Any) -> bool:
    return "FlowMatch" in type(scheduler).__name__


def times_of(scheduler: Any) -> Tensor:
    """The grid `(N+1,)` of the oracle and of ours."""
    edm = "sigma_data" in scheduler.config
    return torch.tensor(EDM_TIMES if edm else FLOW_TIMES if is_flow(scheduler) else BETA_TIMES).double()


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    kind    equal; differs; refused (when attached); refused late, crashed (in the call); no gradient (to be learned
            by); not built; not run (by diffusers itself)
    words   the reason, or how far off
    """

    kind: str
    words: str = ""


class Ended(Exception):
    """A trial that has come to its outcome."""


def ended(kind: str, words: Any = "") -> Ended:
    return Ended(Outcome(kind, f"{type(words).__name__}: {words}" if isinstance(words, Exception) else str(words)))


def trial(of: Callable[[str], Outcome]) -> Callable[[str], Outcome]:
    """`of` a pipeline class by its name, whatever way it ends."""

    def tried(name: str) -> Outcome:
        try:
            return of(name)
        except Ended as end:
            outcome: Outcome = end.args[0]
            return outcome
        except NotBuilt as error:
            return Outcome("not built", str(error))

    return tried


@trial
def shared_times(name: str) -> Outcome:
    """A grid that all samples share, in a pipeline of the class `name`, against the oracle."""
    pipe = pipeline(name)
    own = scheduler_of(pipe)
    detach(attached(pipe, times_of(own)))
    usual = by_diffusers(pipe, [0])
    put(pipe, oracle(own))
    expected = by_diffusers(pipe, [0])
    if expected.shape == usual.shape and torch.equal(expected, usual):
        raise ended("not run", "the grid makes no difference")
    put(pipe, own)
    found = by_ours(pipe, times_of(own), [0])
    return compared(found, expected, tolerance(name))


@trial
def own_times(name: str) -> Outcome:
    """A grid for each of two samples, against each sample alone on its grid.

    Pipelines that take one sample a call, or two that are not those two alone, take one with a grid of its own.
    """
    pipe = pipeline(name)
    own = scheduler_of(pipe)
    rows = torch.stack([times_of(own), torch.cat([times_of(own)[:1], 0.9 * times_of(own)[1:-1], times_of(own)[-1:]])])
    detach(attached(pipe, rows))
    put(pipe, oracle(own))
    by_diffusers(pipe, [0])
    several = [0, 1]
    try:
        together = by_diffusers(pipe, several)
        alone = torch.cat([by_diffusers(pipe, [row]) for row in several])
        pairs = compared(together, alone, tolerance(name)).kind == "equal"
    except (Ended, RuntimeError):
        pairs = False
    put(pipe, own)
    if not pairs:
        several = [0]
        rows = rows[1:]
    found = by_ours(pipe, rows, several)
    expected = torch.cat([by_ours(pipe, rows[row], [row]) for row in several])
    outcome = compared(found, expected, tolerance(name))
    return Outcome(outcome.kind, outcome.words + ("" if pairs else ", one a call"))


@trial
def learning(name: str) -> Outcome:
    """Gradients reach the logits of a grid, and the pipeline, attached, ends in the states that are learned on."""
    pipe = pipeline(name)
    call = {key: value for key, value in arguments(pipe, [0]).items() if key not in OURS}
    with TemporaryDirectory() as folder:
        for row in (0, 1):
            picture(row).save(Path(folder) / f"{row}.png")
        call |= {key: folder for key, value in call.items() if "image" in key and isinstance(value, Image.Image)}
        return _learned(pipe, call)


def _learned(pipe: Any, call: dict[str, Any]) -> Outcome:
    try:
        denoiser = _denoiser(pipe, call)
        space = GridSpace(denoiser.noise_schedule, LEARNED_STEPS)
        z = space.numbers(TimeGrid(make("karras", denoiser.noise_schedule, LEARNED_STEPS))).clone().requires_grad_()
        x_T = initial_noise(0, [0, 1], denoiser.shape)
        texts = list(WORDS[:2])
        grid, condition = space.grid(z), dict(denoiser.encode(texts) if denoiser.encode else {})
        if denoiser.numbered is not None:
            condition["number"] = torch.arange(2)
        end = integrate(denoiser, build_solver("ddim", denoiser.noise_schedule), grid, x_T, condition=condition).x
    except TsAdaptError as error:
        raise ended("refused", str(error)) from error
    except Exception as error:
        raise ended("crashed", error) from error
    try:
        (gradient,) = torch.autograd.grad(end.float().square().mean(), z)
    except RuntimeError as error:  # states that are changed in place
        raise ended("no gradient", error) from error
    if not (gradient.isfinite().all() and gradient.abs().max() > 0):
        raise ended("no gradient")
    if not isinstance(denoiser, PipelineDenoiser) or "latents" not in denoiser.arguments.takes:
        return Outcome("equal", "its noise cannot be given when it is attached")
    ends, rows = [], [slice(2)] if not denoiser.alone else [slice(1), slice(1, 2)]
    for row in rows:
        noise = x_T[row].clone() if denoiser._form is None else denoiser._form(x_T[row])
        here = denoiser.arguments.of(condition_rows(condition, row), len(noise))
        given = {**here, "latents": noise, "num_inference_steps": LEARNED_STEPS, "output_type": "pt"}
        given = {key: value for key, value in given.items() if key in denoiser.arguments.takes}
        ends.append(_last_state(pipe, grid.times.detach(), given, [0, 1][row])[: len(noise)])
    return compared(torch.cat(ends).float(), end.detach().float(), LEARNED_ALIKE)


def _denoiser(pipe: Any, call: dict[str, Any]) -> Any:
    """As a command makes it: of the few that are known by name the network alone, where no noise can be given."""
    try:
        return PipelineDenoiser(pipe, call)
    except TsAdaptError:
        if "latents" in inspect.signature(type(pipe).__call__).parameters or not is_direct(pipe):
            raise
        return from_pipeline(pipe)


def _last_state(pipe: Any, times: Tensor, given: dict[str, Any], numbers: Sequence[int]) -> Tensor:
    """Where the scheduler leaves `pipe`, called with what is `given` on the grid of `times`, whatever follows."""
    scheduler, ends = attached(pipe, times).scheduler, list[Tensor]()
    step, draws = scheduler.step, OwnDraws([(0, number) for number in numbers])

    def noted(*args: Any, **kwargs: Any) -> Any:
        ends.append((out := step(*args, **kwargs))[0])
        return out

    scheduler.step = noted
    try:
        with torch.no_grad(), drawn_alike(), draws:
            pipe(**given)
    except Exception as error:
        if len(ends) < LEARNED_STEPS:  # as diffusers' own run of two samples does
            raise ended("not run", error) from error
    finally:
        detach(pipe)
    return ends[-1]


def scheduler_of(pipe: Any) -> Any:
    if getattr(pipe, "scheduler", None) is None:
        raise ended("refused", "it has no scheduler")
    return pipe.scheduler


def attached(pipe: Any, times: Tensor) -> Any:
    """`pipe` on a grid of ours; ends the trial where that is refused."""
    try:
        return attach(pipe, LearnedScheduler.from_grid(times, "ddim", pipe.scheduler.config))
    except TsAdaptError as error:
        raise ended("refused", str(error)) from error


def by_diffusers(pipe: Any, rows: Sequence[int]) -> Tensor:
    try:
        return called(pipe, rows)
    except Exception as error:
        raise ended("not run", error) from error


def by_ours(pipe: Any, times: Tensor, rows: Sequence[int]) -> Tensor:
    """What `pipe` gives on a grid of ours, which it has accepted before."""
    attached(pipe, times)
    try:
        return called(pipe, rows)
    except TsAdaptError as error:
        raise ended("refused late", str(error)) from error
    except Exception as error:
        raise ended("crashed", error) from error
    finally:
        detach(pipe)


def tolerance(name: str) -> float:
    return float(others(name).get("tolerance", 1e-3))


def compared(found: Tensor, expected: Tensor, tolerance: float) -> Outcome:
    """Equal to `tolerance` of the size of `expected`, if that is a number."""
    if not expected.isfinite().all():
        raise ended("not run", "its result is no number")
    if found.shape != expected.shape:
        return Outcome("differs", f"shape {tuple(found.shape)} for {tuple(expected.shape)}")
    off = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    return Outcome("equal" if off <= tolerance else "differs", f"{off:.1e}")
