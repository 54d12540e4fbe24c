"""What the config of a scheduler stands for, over every scheduler of diffusers and every key of its config.

A config that is taken means the noise that the states of the scheduler itself have at every timestep that it hands to
a network; one that is not taken is refused by the name of its class or of its key.
"""

from __future__ import annotations

import inspect
import math
import pkgutil
import sys
import types
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Literal, get_args, get_origin

import diffusers
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)

from ts_adapt.denoisers.pipeline import from_pipeline
from ts_adapt.denoisers.scheduler_config import (
    EDM,
    EDM_KEYS,
    NEUTRAL,
    NOISE_DEFAULTS,
    NOT_SAMPLED,
    REPLACED,
    differences,
    noise_config,
    noise_of,
    scheduler_config,
)
from ts_adapt.errors import TsAdaptError
from ts_adapt.noise import BetaTable, RectifiedFlow
from ts_adapt.schedulers.attach import attach
from ts_adapt.schedulers.scheduler import LearnedScheduler

STEPS = 10
ONE_ZERO, ZERO_ONE = (torch.eye(2)[place].split(1) for place in (0, 1))
REQUIRED = {
    "AmusedScheduler": {"mask_token_id": 5},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "const", "tsr_k": 1.0, "tsr_sigma": 1.0},
    "VQDiffusionScheduler": {"num_vec_classes": 4},
}
"""What some classes cannot be made without."""
GIVEN = {"trained_betas": torch.linspace(1e-4, 0.03, 100).tolist(), "scale_factors": [0.5, 1.0], "sigma_max": 100.0}
"""A value for keys whose default says nothing of their kind."""


def scheduler_classes() -> dict[str, Any]:
    """Every scheduler in the modules of diffusers; two of them import torchsde, of which no more is needed here."""
    found: dict[str, Any] = {}
    stand_in = "torchsde" not in sys.modules
    sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
    try:
        for module in pkgutil.walk_packages(diffusers.schedulers.__path__, "diffusers.schedulers."):
            if "flax" not in module.name:
                for name, kind in vars(import_module(module.name)).items():
                    if inspect.isclass(kind) and issubclass(kind, SchedulerMixin) and kind is not SchedulerMixin:
                        found[name] = kind
    finally:
        if stand_in:
            del sys.modules["torchsde"]
    return found


CLASSES = scheduler_classes()
TAKEN = {
    "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMParallelScheduler", "DDIMScheduler",
    "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LCMScheduler", "LMSDiscreteScheduler", "LTXEulerAncestralRFScheduler", "PNDMScheduler", "SASolverScheduler",
    "TCDScheduler", "UnCLIPScheduler", "UniPCMultistepScheduler", *EDM,
}  # fmt: skip
"""The schedulers whose noise schedule is one of ours, as they are by default."""


def keys_of(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(CLASSES[name].__init__).parameters)


def values(key: str, parameter: inspect.Parameter) -> list[Any]:
    """Other values for a key than its default."""
    default, annotation = parameter.default, parameter.annotation
    literals = [
        value for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal for value in get_args(part)
    ]
    if literals or isinstance(default, bool):
        return [value for value in literals or [True, False] if value != default]
    if isinstance(default, int | float):
        return [200 if key == "num_train_timesteps" else 2 * default or 1]
    return [GIVEN[key]] if key in GIVEN else []


def variants(name: str) -> Iterator[dict[str, Any]]:
    """The default config of a class, each key changed by itself, and each together with another kind of grid."""
    keys = keys_of(name)
    yield {}
    for key, parameter in keys.items():
        for value in values(key, parameter):
            yield {key: value}
            for other in {"use_karras_sigmas", "use_flow_sigmas"} & keys.keys() - {key}:
                yield {key: value, other: True}
    if "prediction_type" in keys:
        for more in ({"rescale_betas_zero_snr": True}, {"timestep_type": "continuous"}, {"use_flow_sigmas": True}):
            for predicted in ("sample", "v_prediction", "flow_prediction"):
                if more.keys() <= keys.keys():
                    yield {"prediction_type": predicted, **more}


def made(name: str, changes: dict[str, Any]) -> Any:
    """The scheduler; None where diffusers makes none of these values."""
    try:
        small = {"num_train_timesteps": 100} if "num_train_timesteps" in keys_of(name) else {}
        return CLASSES[name](**{**small, **REQUIRED.get(name, {}), **changes})
    except (ArithmeticError, IndexError, NotImplementedError, TypeError, ValueError):
        return None


def own_noise(scheduler: Any) -> Iterator[tuple[torch.Tensor, float]]:
    """The timesteps of a run of `scheduler`, and sigma / alpha of the states that it hands to the network with them."""
    try:
        scheduler.set_timesteps(STEPS, **({"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}))
    except (ArithmeticError, IndexError, NotImplementedError, TypeError, ValueError):
        return
    flow = scheduler.config.get("use_flow_sigmas") or not hasattr(scheduler, "alphas_cumprod")
    flow = flow and type(scheduler).__name__ not in EDM
    for place in range(
        0, len(scheduler.timesteps), getattr(scheduler, "order", 1)
    ):  # the others are midpoints, told by their ends
        timestep = scheduler.timesteps[place]
        if hasattr(scheduler, "sigmas"):
            sigma = float(scheduler.sigmas[place])
            yield timestep, sigma if not flow else sigma / (1 - sigma) if sigma < 1 else math.inf
        else:
            x, eps = (float(scheduler.add_noise(*pair, timestep[None])) for pair in (ONE_ZERO, ZERO_ONE))
            yield timestep, eps / x if x else math.inf


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_key_of_every_scheduler_is_followed_or_refused_by_name(name: str) -> None:
    taken = 0
    for changes in variants(name):
        scheduler = made(name, changes)
        if scheduler is None:
            continue
        try:
            noise_schedule, _ = noise_of(scheduler_config(scheduler))
        except TsAdaptError as error:
            named = changes if taken else [name]
            assert any(key in str(error) for key in (*named, "use_flow_sigmas")), (changes, str(error))
            continue
        taken += 1
        for timestep, expected in own_noise(scheduler):
            moved = any(scheduler.config[key] is True for key in scheduler.config if key.startswith("use_"))  # rounded
            told = noise_schedule.time_of_timestep(timestep.double() + torch.tensor([moved, 0.0, -moved]))
            low, _, high = noise_schedule.log_snr(told.clamp(noise_schedule.t_min, noise_schedule.t_max)).tolist()
            if 1e-3 < expected < 1e3:  # beyond, diffusers clips zero terminal SNR, and float32 says little
                assert low - 0.02 < -math.log(expected) < high + 0.02, (changes, timestep)
    assert bool(taken) == (name in TAKEN)


def cogvideox(**changes: Any) -> Any:
    """The scheduler of CogVideoX 5B."""
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 1.0, **changes}
    return CogVideoXDDIMScheduler(timestep_spacing="trailing", set_alpha_to_one=True, **options)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("zero", [False, True])
def test_the_shift_of_the_snr_divides_it(shift: float, zero: bool) -> None:
    theirs = cogvideox(snr_shift_scale=shift, rescale_betas_zero_snr=zero)
    noise_schedule, _ = noise_of(scheduler_config(theirs))
    t = torch.arange(999)
    torch.testing.assert_close(
        noise_schedule.alpha(t), theirs.alphas_cumprod.double().sqrt()[:-1], rtol=1e-5, atol=1e-5
    )
    if not zero:
        plain, _ = noise_of(scheduler_config(cogvideox(snr_shift_scale=1.0, rescale_betas_zero_snr=False)))
        moved = plain.log_snr(t) - math.log(shift) / 2
        torch.testing.assert_close(noise_schedule.log_snr(t), moved, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("scheduler", "key"),
    [
        (EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"), "timestep_type"),
        (EulerDiscreteScheduler(sigma_max=700.0, use_karras_sigmas=True), "sigma_max"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas"),
        (DDIMScheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr .* and prediction_type epsilon"),
        (DDIMInverseScheduler(), "DDIMInverseScheduler is not supported: it goes from data to noise"),
    ],
)
def test_what_cannot_be_followed_is_refused_when_attaching(scheduler: Any, key: str, tiny: Any) -> None:
    """The config alone is refused likewise, where it tells no class."""
    pipe = tiny.pipeline("ddpm")
    pipe.scheduler = scheduler
    for make in (lambda: attach(pipe, LearnedScheduler.from_grid("karras")), lambda: from_pipeline(pipe)):
        with pytest.raises(TsAdaptError, match=key):
            make()
    assert pipe.scheduler is scheduler
    if not isinstance(scheduler, DDIMInverseScheduler):
        with pytest.raises(TsAdaptError, match=key):
            LearnedScheduler.from_config(scheduler.config)


def test_a_prediction_that_is_given_takes_the_place_of_the_configs(tiny: Any) -> None:
    pipe = tiny.pipeline("ddpm")
    pipe.scheduler = DDIMScheduler(rescale_betas_zero_snr=True)
    denoiser = from_pipeline(pipe, "v")
    assert denoiser.prediction == "v" and denoiser.scheduler_config["prediction_type"] == "v_prediction"


def test_keys_of_another_class_are_carried_and_not_followed() -> None:
    """A scheduler from the config of another keeps its keys, and does not look at those it does not know."""
    mixed = DDIMScheduler.from_config(cogvideox(snr_shift_scale=3.0).config)
    assert mixed.config["snr_shift_scale"] == 3.0
    noise_schedule, _ = noise_of(scheduler_config(mixed))
    torch.testing.assert_close(
        noise_schedule.alpha(torch.arange(999)), mixed.alphas_cumprod.double().sqrt()[:-1], rtol=1e-5, atol=1e-5
    )
    assert noise_config(scheduler_config(mixed))["snr_shift_scale"] == 1.0


def test_a_learned_scheduler_carries_the_noise_schedule_on() -> None:
    given = scheduler_config(cogvideox(snr_shift_scale=3.0))
    learned = LearnedScheduler.from_config(given)
    again = LearnedScheduler.from_config(LearnedScheduler.from_grid("karras", config=learned.config).config)
    back = CogVideoXDDIMScheduler.from_config(again.config)
    for config in (scheduler_config(learned), scheduler_config(again), scheduler_config(back)):
        assert differences(noise_of(given), noise_of(config)) == []
    plain = noise_of(scheduler_config(cogvideox()))
    assert "the beta table" in differences(noise_of(given), plain)[0]


@pytest.mark.parametrize("count", [1000, 10])
def test_flows_are_told_the_timesteps_of_their_own_number(count: int) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(count, shift=3.0)
    ours = LearnedScheduler.from_grid(torch.tensor([1.0, 0.6, 0.2, 0.0]), "euler", scheduler_config(theirs))
    ours.set_timesteps(3)
    torch.testing.assert_close(ours.timesteps, count * torch.tensor([1.0, 0.6, 0.2]))
    other = RectifiedFlow(time_scale=500.0), "velocity"
    assert differences((ours.noise_schedule, ours.prediction), other) == [
        f"the network's timestep at t = 1 ({count}, the pipeline's is 500)"
    ]


def test_a_schedule_with_a_shift_and_no_betas_is_a_flow_where_its_class_is_not_known() -> None:
    assert isinstance(noise_of({"num_train_timesteps": 1000, "shift": 3.0})[0], RectifiedFlow)
    assert isinstance(noise_of({"beta_schedule": "linear"})[0], BetaTable)
    with pytest.raises(TsAdaptError, match="time runs from 0 at noise to 1 at data"):
        noise_of({"_class_name": "MiniMaxH3Scheduler", "shift": 12.0})


def test_the_tables_of_keys_do_not_overlap() -> None:
    every = {key for name in TAKEN for key in keys_of(name)} - {"self"}
    assert not (NOISE_DEFAULTS.keys() & REPLACED or NEUTRAL.keys() & (REPLACED | NOISE_DEFAULTS.keys()))
    assert every <= REPLACED | NOISE_DEFAULTS.keys() | NEUTRAL.keys() | EDM_KEYS.keys()
    assert not TAKEN & NOT_SAMPLED.keys() and NOT_SAMPLED.keys() <= CLASSES.keys()
