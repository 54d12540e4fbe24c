"""What the config of a scheduler of diffusers stands for: a noise schedule, and what the network predicts.

betas              beta_schedule (from beta_start to beta_end) or trained_betas, num_train_timesteps of them; then
                   snr_shift_scale and rescale_betas_zero_snr. The network is told t
rectified flow     a FlowMatch scheduler, or prediction_type "flow_prediction". The network is told t times
                   num_train_timesteps
EDM                a scheduler of `EDM`, or a `sigma_data`: sigma from sigma_min to sigma_max. The network is shown
                   states in the unit of their variance, and told log(sigma) / 4 or arctan(sigma) 2 / pi (`sigma_told`)
not yet known      beta_schedule None, of `LearnedScheduler` alone: a fixed grid that takes over the noise schedule of
                   the pipeline it meets

Whoever reads a config brings a grid, a solver and a clipping of x0 of their own: the keys of those (`REPLACED`) are not
looked at. Any other key that would change the noise, the time or the prediction is refused by its name, and so is a
scheduler that does not step from noise to data with a network of one time (`NOT_SAMPLED`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sized
from typing import Any

import torch

from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import NoiseSchedule
from ts_adapt.noise import TOLD, BetaTable, Preconditioned, RectifiedFlow
from ts_adapt.parameterization import PARAMETERIZATIONS, PREDICTION_TYPES
from ts_adapt.storage.files import shortened

NOISE_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "snr_shift_scale": 1.0,
    "prediction_type": "epsilon",
}
"""The keys of a config that make up its noise schedule and its prediction; what a config that lacks one means by it."""
EDM_KEYS: dict[str, Any] = {"sigma_data": None, "sigma_min": None, "sigma_max": None, "sigma_told": "log"}
"""Those that EDM's have in place of betas; what a noise schedule with betas, or a flow, has there."""
UNKNOWN: dict[str, Any] = {**NOISE_DEFAULTS, "beta_schedule": None}
"""The noise schedule of a fixed grid that no pipeline has been named for."""
FLOW = "flow_prediction"
REPLACED = {
    # the grid
    "base_image_seq_len", "base_shift", "final_sigmas_type", "flow_shift", "interpolation_type", "lambda_min_clipped",
    "max_image_seq_len", "max_shift", "original_inference_steps", "rho", "set_alpha_to_one", "shift", "shift_terminal",
    "sigma_schedule", "steps_offset", "time_shift_type", "timestep_spacing", "use_beta_sigmas", "use_dynamic_shifting",
    "use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas",
    # the solver
    "algorithm_type", "corrector_order", "disable_corrector", "eta", "euler_at_final", "lower_order_final",
    "noise_sampler_seed", "predict_x0", "predictor_order", "s_noise", "skip_prk_steps", "solver_order", "solver_p",
    "solver_type", "stochastic_sampling", "tau_func", "timestep_scaling", "upscale_mode", "variance_type",
    # what becomes of x0
    "clip_sample", "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "thresholding",
}  # fmt: skip
"""The keys that say how a scheduler of diffusers places its steps, takes them, and clips."""
NEUTRAL: dict[str, Any] = {
    "invert_sigmas": False,
    "scale_factors": None,
    "sigma_max": None,
    "sigma_min": None,
    "timestep_type": "discrete",
    "use_flow_sigmas": False,
}
"""Keys that are neither followed nor replaced -> the value at which they change nothing."""
NOT_SAMPLED = {
    "DDIMInverseScheduler": "it goes from data to noise",
    "DPMSolverMultistepInverseScheduler": "it goes from data to noise",
    "FlowMapEulerDiscreteScheduler": "its network is told where a step ends as well",
    "HeliosDMDScheduler": "it samples in stages of growing size, each with noise of its own",
    "HeliosScheduler": "it samples in stages of growing size, each with noise of its own",
    "IPNDMScheduler": "its betas mean another noise than those of other schedulers",
    "MiniMaxH3Scheduler": "its time runs from 0 at noise to 1 at data",
    "PiflowScheduler": "its network predicts a step, not one x0",
    "RePaintScheduler": "it goes back to noise between its steps",
}
EDM = {
    "CosineDPMSolverMultistepScheduler": "arctan",
    "EDMDPMSolverMultistepScheduler": "log",
    "EDMEulerScheduler": "log",
}
"""Schedulers without betas, in edm_sigma -> how their networks are told it."""
EDM_PREDICTIONS = {"epsilon": "minus_v", "v_prediction": "v"}
"""What `prediction_type` means of their networks, F with one sign or the other."""
MAX_TABLE = 1_000_000

Noise = tuple[NoiseSchedule, str]
"""A noise schedule and what the network predicts, in the words of `parameterization`."""


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """The config of `scheduler`, with the name of its class, which a flow may be known by."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def noise_of(config: Mapping[str, Any], name: str | None = None, prediction: str | None = None) -> Noise:
    """The noise schedule and the prediction that a scheduler's config stands for.

    name        of the scheduler's class; None: the config's `_class_name`. Of a class of diffusers its own keys count
    prediction  in the words of `parameterization`, in place of the config's

    A rectified flow is known by the name, by its prediction type, or by a `shift` without betas. Raises TsAdaptError,
    naming what it is, for a config without betas that is no flow, for values that make no noise schedule, for whatever
    cannot be followed, and for zero terminal SNR with a network that predicts epsilon, which says nothing of x0 there.
    """
    own, name, defaults = _own(config, name)
    if name in NOT_SAMPLED:
        raise TsAdaptError(f"{name} is not supported: {NOT_SAMPLED[name]}; give the pipeline another scheduler")
    predicted, steps = own.get("prediction_type", "epsilon"), own.get("num_train_timesteps", 1000)
    if not isinstance(predicted, str):
        raise TsAdaptError(f"prediction_type is {predicted!r}; expected a name, such as epsilon")
    if not isinstance(steps, int) or isinstance(steps, bool) or not 2 <= steps <= MAX_TABLE:
        raise TsAdaptError(f"num_train_timesteps is {steps!r}; expected a whole number from 2 to {MAX_TABLE}")
    named = "sigma_told" in own or own.get("prediction_type") in EDM_PREDICTIONS
    if name in EDM or (defaults is None and own.get("sigma_data") is not None and named):
        return _edm(own, name, prediction)
    without_betas = "beta_schedule" not in own and own.get("trained_betas") is None
    flow = "FlowMatch" in name or name == "LTXEulerAncestralRFScheduler"
    flow = flow or (predicted == FLOW and (defaults is None or "use_flow_sigmas" in defaults))
    flow = flow or (defaults is None and without_betas and "shift" in own)
    if without_betas and not flow:
        raise TsAdaptError(f"the config of {name} has no betas and is no rectified flow; its noise schedule is unknown")
    _refuse_unfollowed(own, name, {**(defaults or {}), **NEUTRAL} | ({"use_flow_sigmas": True} if flow else {}))
    if flow:
        return RectifiedFlow(time_scale=float(steps)), prediction or "velocity"
    if prediction is None and (predicted not in PREDICTION_TYPES or predicted == FLOW):
        raise TsAdaptError(
            f"prediction_type {predicted!r} of {name} is not known; pass prediction= one of "
            f"{', '.join(PARAMETERIZATIONS)}"
        )
    table, prediction = _table(own, name), prediction or PREDICTION_TYPES[predicted]
    if table.zero_terminal_snr and prediction == "epsilon":
        raise TsAdaptError(
            f"{name} has rescale_betas_zero_snr (a last alpha of 0) and prediction_type epsilon, which says nothing of "
            "x0 there; give a scheduler with one of them alone"
        )
    return table, prediction


def _edm(own: Mapping[str, Any], name: str, prediction: str | None) -> Noise:
    numbers: list[Any] = [own.get(key) for key in ("sigma_min", "sigma_max", "sigma_data")]
    low, high, data = numbers
    cosine = "solver_order" in own and "thresholding" not in own  # a config that tells no class
    told = own.get("sigma_told", EDM.get(name, "arctan" if cosine else "log"))
    predicted = EDM_PREDICTIONS.get(str(own.get("prediction_type")))
    real = all(isinstance(value, int | float) and math.isfinite(value) for value in (low, high, data))
    if not real or not 0 < low < high or not data > 0 or told not in TOLD:
        raise TsAdaptError(
            f"{name} has sigma_min {low!r}, sigma_max {high!r}, sigma_data {data!r} and sigma_told {told!r}; expected "
            f"0 < sigma_min < sigma_max, a positive sigma_data, and one of {', '.join(TOLD)}"
        )
    if predicted is None or prediction not in (None, predicted):
        raise TsAdaptError(
            f"{name} has prediction_type {own.get('prediction_type')!r} and prediction {prediction!r} is asked for; "
            f"EDM's networks predict {' or '.join(EDM_PREDICTIONS)} in their own variables: leave prediction out"
        )
    return Preconditioned(float(low), float(high), float(data), told), predicted


def _own(config: Mapping[str, Any], name: str | None = None) -> tuple[dict[str, Any], str, dict[str, Any] | None]:
    """The keys that the scheduler itself reads, its name, and the defaults of its class; None: none of diffusers.

    Configs carry keys of other classes along, from which they were made.
    """
    import diffusers

    name = str(name or config.get("_class_name") or "the scheduler")
    found = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not (inspect.isclass(found) and issubclass(found, diffusers.SchedulerMixin)):
        return dict(config), name, None
    defaults = {key: p.default for key, p in inspect.signature(found.__init__).parameters.items()}
    return {key: value for key, value in config.items() if key in defaults}, name, defaults


def _refuse_unfollowed(config: Mapping[str, Any], name: str, neutral: Mapping[str, Any]) -> None:
    for key in sorted(config.keys() & neutral.keys() - NOISE_DEFAULTS.keys() - REPLACED):
        if config[key] != neutral[key]:
            raise TsAdaptError(
                f"{name} has {key} = {config[key]!r}, which cannot be followed: it would change the noise, the time "
                f"that the network is told, or what it predicts; give a scheduler with {key} = {neutral[key]!r}"
            )


def _table(config: Mapping[str, Any], name: str) -> BetaTable:
    trained = config.get("trained_betas")
    if trained is not None and (not isinstance(trained, Sized) or len(trained) > MAX_TABLE):
        raise TsAdaptError(f"trained_betas are {shortened(trained)}; expected a list of at most {MAX_TABLE} numbers")
    try:
        return BetaTable.from_config(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TsAdaptError(f"the betas of {name} are no numbers ({error}); give those of the pipeline") from error


def noise_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `NOISE_DEFAULTS` and `EDM_KEYS` as any config of a scheduler has them; TsAdaptError as `noise_of`."""
    noise_schedule, prediction = noise_of(config)
    own, _, _ = _own(config)
    taken = {key: own.get(key, default) for key, default in NOISE_DEFAULTS.items()}
    edm = isinstance(noise_schedule, Preconditioned)
    if edm or prediction == "velocity":
        taken |= {key: value for key, value in NOISE_DEFAULTS.items() if "beta" in key}
    if prediction == "velocity":
        taken["prediction_type"] = FLOW
    told = {"sigma_told": noise_schedule.told} if isinstance(noise_schedule, Preconditioned) else {}
    return taken | {key: own[key] if edm and key in own else default for key, default in EDM_KEYS.items()} | told


def differences(ours: Noise, theirs: Noise) -> list[str]:
    """What a schedule was learned for and a pipeline has not, in words; empty where they agree."""
    (noise_schedule, prediction), (other, predicted) = ours, theirs
    found = []
    if prediction != predicted:
        found.append(f"the prediction type ({prediction}, the pipeline's is {predicted})")
    if type(noise_schedule) is not type(other):
        found.append(f"the noise schedule ({type(noise_schedule).__name__}, the pipeline's is {type(other).__name__})")
    elif noise_schedule.time_scale != other.time_scale:
        found.append(
            f"the network's timestep at t = 1 ({noise_schedule.time_scale:g}, the pipeline's is {other.time_scale:g})"
        )
    elif isinstance(noise_schedule, Preconditioned) and noise_schedule != other:
        found.append(f"EDM's noise ({noise_schedule}, the pipeline's is {other})")
    elif (
        isinstance(noise_schedule, BetaTable)
        and isinstance(other, BetaTable)
        and not _same_table(noise_schedule, other)
    ):
        found.append(f"the beta table ({_described(noise_schedule)}, the pipeline's has {_described(other)})")
    return found


def _same_table(one: BetaTable, other: BetaTable) -> bool:
    if one.t_max != other.t_max or one.zero_terminal_snr != other.zero_terminal_snr:
        return False
    t = torch.arange(one.t_max, dtype=torch.float64)
    return torch.allclose(one.log_snr(t), other.log_snr(t), rtol=0, atol=1e-4)


def _described(table: BetaTable) -> str:
    last = table.t_max - 1 if table.zero_terminal_snr else table.t_max
    ends = [float(table.log_snr(torch.tensor(t, dtype=torch.float64))) for t in (0.0, last)]
    kind = ", zero terminal SNR" if table.zero_terminal_snr else ""
    return f"{int(table.t_max) + 1} timesteps, log-SNR {ends[0]:.3f} to {ends[1]:.3f}{kind}"
