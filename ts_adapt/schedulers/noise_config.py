"""The noise schedule of a scheduler's config, and how those of a schedule and of a pipeline differ.

betas              num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr
rectified flow     prediction_type "flow_prediction"; a network's timestep is num_train_timesteps * t
not yet known      beta_schedule None: a fixed grid that takes over those of the first pipeline it meets
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Tensor

from ts_adapt.denoisers.pipeline import noise_of
from ts_adapt.files import shortened
from ts_adapt.interfaces import NoiseSchedule, TsAdaptError, as_node_times
from ts_adapt.noise import BetaTable, RectifiedFlow
from ts_adapt.numerics import combine
from ts_adapt.sampling import noise_scale

NOISE_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
}
"""The keys of a config that make up its noise schedule, with diffusers' defaults."""
UNKNOWN: dict[str, Any] = {**NOISE_DEFAULTS, "beta_schedule": None}
"""The noise schedule of a fixed grid that no pipeline has been named for."""
MAX_TABLE = 1_000_000

Noise = tuple[NoiseSchedule, str]
"""A noise schedule and what the network predicts, in the words of `parameterization`."""


def noise_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `NOISE_DEFAULTS` as the config of any scheduler of diffusers has them.

    Raises TsAdaptError where that has no noise schedule of ours.
    """
    noise, _ = _read(config, str(config.get("_class_name", "the scheduler")))
    taken = {key: config.get(key, default) for key, default in NOISE_DEFAULTS.items()}
    if isinstance(noise, RectifiedFlow):
        taken |= {key: NOISE_DEFAULTS[key] for key in NOISE_DEFAULTS if "beta" in key}
        taken["prediction_type"] = "flow_prediction"
    return taken


def read_noise(config: Mapping[str, Any]) -> Noise | None:
    """The noise schedule of a `LearnedScheduler`'s config; None where it is not yet known.

    Raises TsAdaptError for values that make none.
    """
    flow = config["prediction_type"] == "flow_prediction"
    if not flow and config["beta_schedule"] is None and config["trained_betas"] is None:
        return None
    return _read(config, "LearnedScheduler")


def _read(config: Mapping[str, Any], name: str) -> Noise:
    """`noise_of`, with values of the wrong kind or size refused."""
    steps, trained = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    if not isinstance(steps, int) or isinstance(steps, bool) or not 2 <= steps <= MAX_TABLE:
        raise TsAdaptError(f"num_train_timesteps is {steps!r}; expected a whole number from 2 to {MAX_TABLE}")
    if trained is not None and (not isinstance(trained, Sized) or len(trained) > MAX_TABLE):
        raise TsAdaptError(f"trained_betas are {shortened(trained)}; expected a list of at most {MAX_TABLE} numbers")
    kind = config.get("prediction_type", "epsilon")
    if not isinstance(kind, str):
        raise TsAdaptError(f"prediction_type is {kind!r}; expected a name, such as epsilon")
    try:
        return noise_of(config, name)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TsAdaptError(f"the betas of {name} are no numbers ({error}); give those of the pipeline") from error


def differences(ours: Noise, theirs: Noise) -> list[str]:
    """What a schedule was learned for and a pipeline has not, in words; empty where they agree."""
    (noise, prediction), (other, predicted) = ours, theirs
    found = []
    if prediction != predicted:
        found.append(f"the prediction type ({prediction}, the pipeline's is {predicted})")
    if type(noise) is not type(other):
        found.append(f"the noise schedule ({type(noise).__name__}, the pipeline's is {type(other).__name__})")
    elif isinstance(noise, BetaTable) and isinstance(other, BetaTable) and not _same_table(noise, other):
        found.append(f"the beta table ({_described(noise)}, the pipeline's has {_described(other)})")
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


class NoiseOfConfig:
    """The part of `LearnedScheduler` that knows its noise schedule from its config."""

    config: Any
    register_to_config: Any
    run: Any
    _kept: dict[int, Any]
    _noise: Noise | None

    @property
    def known_noise(self) -> Noise | None:
        """The noise schedule and the prediction; None where a pipeline has still to give them."""
        return self._noise

    @property
    def noise(self) -> NoiseSchedule:
        return self._known()[0]

    @property
    def prediction(self) -> str:
        """What the network predicts, in the words of `parameterization`."""
        return self._known()[1]

    def _known(self) -> Noise:
        if self._noise is None:
            raise TsAdaptError(
                "this grid has no noise schedule yet; attach it to a pipeline, or pass config=pipe.scheduler.config"
            )
        return self._noise

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take over the noise schedule and the prediction type of another scheduler's config; the times stay.

        Raises TsAdaptError where the times do not run over that noise schedule.
        """
        noise = noise_config(config)
        adopted = read_noise(noise)
        if self._noise is not None and adopted is not None:
            old, new = self._noise[0], adopted[0]
            if (old.t_min, old.t_max) != (new.t_min, new.t_max):
                raise TsAdaptError(
                    f"the schedule's times run from {old.t_max:g} to {old.t_min:g}, the pipeline's from {new.t_max:g} "
                    f"to {new.t_min:g}: they mean other noise there; learn one for this pipeline"
                )
        left = [key for key in self.config.get("_use_default_values", []) if key not in noise]
        self.register_to_config(**noise, _use_default_values=left)
        self._noise, self.run = adopted, None
        self._kept.clear()

    @property
    def time_scale(self) -> float:
        """The network's timestep for t = 1."""
        return float(self.config["num_train_timesteps"]) if isinstance(self.noise, RectifiedFlow) else 1.0

    @property
    def init_noise_sigma(self) -> float:
        """What standard normal noise is multiplied by: 1 for beta tables and rectified flow."""
        return noise_scale(self.noise)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma noise at `timesteps` `()` or `(B,)`, in the network's unit, real or whole."""
        t = as_node_times(timesteps) / self.time_scale
        t = t.clamp(self.noise.t_min, self.noise.t_max)
        x, eps = original_samples.float(), noise.to(original_samples.device).float()
        return combine((self.noise.alpha(t), x), (self.noise.sigma(t), eps)).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` in the order of arguments of diffusers' flow-matching schedulers."""
        return self.add_noise(sample, noise, timestep)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself: states are x_t = alpha x0 + sigma eps."""
        return sample

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])
