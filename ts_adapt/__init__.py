"""ts_adapt: learned time grids for few-step diffusion sampling.

denoiser = ts_adapt.load("fashion-ddpm")                       # or a pipeline folder, or a hub id
solver = ts_adapt.build_solver("unipc-3", denoiser.noise_schedule)
grid = ts_adapt.build_grid("karras", denoiser.noise_schedule, steps=5)  # or a learned one: LearnedGrid.load(path).grid
noise = ts_adapt.initial_noise(seed=0, index=range(16), shape=denoiser.shape)
x_T = noise * ts_adapt.noise_scale(denoiser.noise_schedule)
images = denoiser.decode(ts_adapt.integrate(denoiser, solver, grid, x_T).x)
print(ts_adapt.compare(denoiser, ["karras", "log_snr"], steps=5))       # or learned ones; .figure() draws them

schedule = ts_adapt.LearnedScheduler.from_pretrained(path)     # in a pipeline of diffusers: these two lines
ts_adapt.attach(pipe, schedule)
"""

from typing import TYPE_CHECKING, Any

from ts_adapt import _compat as _compat  # isort: skip  (first: it makes torchvision importable beside a CPU-only torch)
from ts_adapt import zoo
from ts_adapt._version import __version__
from ts_adapt.assembly import build_distance, build_solver
from ts_adapt.denoisers.edm import from_edm
from ts_adapt.denoisers.guidance import Guided
from ts_adapt.denoisers.network import NetworkDenoiser
from ts_adapt.denoisers.pipeline import from_pipeline
from ts_adapt.errors import TsAdaptError, TsAdaptWarning
from ts_adapt.interfaces import Denoiser, Distance, Node, NoiseSchedule, Solver, StepPolicy, TimeGrid
from ts_adapt.noise import BetaTable, ContinuousVP, Cosine, RectifiedFlow, VarianceExploding
from ts_adapt.pipelines.load import load
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.predictors.store import load_predictor
from ts_adapt.sampling import Solution, initial_noise, integrate, noise_scale
from ts_adapt.schedules.file import LearnedGrid
from ts_adapt.schedules.resolve import build_grid
from ts_adapt.search.objective import Batch, Objective
from ts_adapt.search.per_sample import PerSampleOptions, search_per_sample
from ts_adapt.solvers import DDIM, DEIS, IPNDM, Corrected, DPMSolverPP, Euler, Heun, UniP, UniPC

if TYPE_CHECKING:
    from ts_adapt.evaluation.side_by_side import compare, teacher_batch
    from ts_adapt.pipelines.denoiser import PipelineDenoiser
    from ts_adapt.predictors.phases import TrainOptions
    from ts_adapt.predictors.training import choose_kept, train_predictor
    from ts_adapt.schedulers.attach import attach, detach
    from ts_adapt.schedulers.scheduler import LearnedScheduler
    from ts_adapt.search.static import search_static
    from ts_adapt.search.static_options import StaticOptions

__all__ = [
    "DDIM",
    "DEIS",
    "IPNDM",
    "Batch",
    "BetaTable",
    "ContinuousVP",
    "Corrected",
    "Cosine",
    "DPMSolverPP",
    "Denoiser",
    "Distance",
    "Euler",
    "Guided",
    "Heun",
    "LearnedGrid",
    "LearnedScheduler",
    "NetworkDenoiser",
    "Node",
    "NoiseSchedule",
    "Objective",
    "OneShot",
    "PerSampleOptions",
    "PipelineDenoiser",
    "RectifiedFlow",
    "Recursive",
    "Solution",
    "Solver",
    "StaticOptions",
    "StepPolicy",
    "TimeGrid",
    "TrainOptions",
    "TsAdaptError",
    "TsAdaptWarning",
    "UniP",
    "UniPC",
    "VarianceExploding",
    "__version__",
    "attach",
    "build_distance",
    "build_grid",
    "build_solver",
    "choose_kept",
    "compare",
    "detach",
    "from_edm",
    "from_pipeline",
    "initial_noise",
    "integrate",
    "load",
    "load_predictor",
    "noise_scale",
    "search_per_sample",
    "search_static",
    "teacher_batch",
    "train_predictor",
    "zoo",
]

_LATER = {
    "LearnedScheduler": "schedulers.scheduler",
    "SchedulerMixin": "schedulers.scheduler",  # diffusers asks for it here, to load a pipeline with our scheduler
    "PipelineDenoiser": "pipelines.denoiser",
    "StaticOptions": "search.static_options",
    "TrainOptions": "predictors.phases",
    "attach": "schedulers.attach",
    "choose_kept": "predictors.training",
    "compare": "evaluation.side_by_side",
    "detach": "schedulers.attach",
    "search_static": "search.static",
    "teacher_batch": "evaluation.side_by_side",
    "train_predictor": "predictors.training",
}
"""Names that import diffusers or scipy, which takes seconds: done when they are first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"ts_adapt.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
