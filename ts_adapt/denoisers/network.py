"""A trained network as a denoiser: its raw prediction becomes x0.

    r  = F(x_t, tau; condition)                 tau = timestep(model_time),     model_time = t unless told otherwise
    x0 = to_x0(output_scale * r, x_t, alpha_t, sigma_t)                          see `parameterization`

Where the noise schedule has a `data_std`, d, the network lives in the unit of the states' variance (`seen`):

    r  = F(c x_t, tau; condition),  x0 = d to_x0(output_scale * r, c x_t, c alpha_t d, c sigma_t),
    c  = 1 / sqrt((alpha_t d)^2 + sigma_t^2)

alpha and sigma are those of t itself: `model_time` changes what the network is told, not where the state is. The
network runs in its own precision; the conversion runs in that of the state, with coefficients computed in float64;
timesteps are handed over as real numbers in float32, as bfloat16 would round 999 to 1000.

Networks of diffusers differ in how they are called. `calling_convention` reads it off the signature of `forward`:

    keyword      network(x, timestep=timestep, ...)  UNet2DModel, UNet2DConditionModel, DiT, PixArt, SD3, ...
    flux         as Flux: 2x2 patches as tokens, positions of tokens as `img_ids`, timestep / 1000
    positional   network(x, timestep, ...)           any other module

Its result may be a tensor, a tuple that begins with one, or an object with `.sample`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Condition, Denoiser, NoiseSchedule, StepAware
from ts_adapt.numerics import as_node_times, dtype_of, each_tensor, scale
from ts_adapt.parameterization import check_prediction, to_x0

NetworkCall = Callable[[nn.Module, Tensor, Tensor, dict[str, Any]], Tensor]
"""(network, x_t `(B, ...)`, timestep `(B,)`, condition) -> the raw prediction `(B, ...)`."""

_STEP_AWARE = "_ts_adapt_step_aware"
TIMES = ("timestep", "timesteps", "t")
"""The names by which networks are told the time."""
QUANTIZATION = "ts_adapt_quantization"
"""The attribute of a network that is quantized at present."""
CORRECTION = "ts_adapt_correction"
"""The module inside a quantized network that corrects what it says."""
ATTACHMENT = "_ts_adapt_attachment"
"""The attribute of a pipeline to which a schedule is attached at present."""


class NetworkDenoiser(Denoiser):
    """x0 from a network that predicts epsilon, sample, v or velocity.

    network     the module; anything of diffusers' making that takes a state and a timestep, or a wrapper of one
    noise_schedule  that it was trained with
    prediction  what it predicts: "epsilon", "sample", "v", "minus_v" or "velocity"
    shape       of a sample without the batch; None: read from `network.config` (in_channels, sample_size)
    time_scale  the network's timestep for t = 1; None: as the noise schedule says (1000 for RectifiedFlow, 1 for beta
                tables, whose t is the timestep)
    clip_x0     clamp x0 to [-1, 1]; off by default, as few-step solvers and gradients are better without
    decoder     from the space of the diffusion to images in [-1, 1]; None: the identity
    null_condition  the condition that stands for "none", where the model has one: what `Guided` needs
    encode      prompts -> their condition, tensors `(B, ...)` by name; None: the model takes no prompts
    call        how the network is called; None: `calling_convention(network)`
    scheduler_config  of the pipeline's scheduler in diffusers, which a `LearnedScheduler` for this model takes over;
                None: the network is in no pipeline

    A network with twice as many output channels has learned a variance as well; only the first half is used.
    `evaluations` counts calls. Raises TsAdaptError for an unknown prediction, or a shape that cannot be inferred.
    """

    network: nn.Module
    prediction: str

    def __init__(
        self,
        network: nn.Module,
        noise_schedule: NoiseSchedule,
        prediction: str,
        *,
        shape: Sequence[int] | None = None,
        time_scale: float | None = None,
        clip_x0: bool = False,
        decoder: Callable[[Tensor], Tensor] | None = None,
        null_condition: Condition | None = None,
        encode: Callable[[Sequence[str]], Condition] | None = None,
        call: NetworkCall | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
    ) -> None:
        check_prediction(prediction)
        self.network = network
        self.noise_schedule = noise_schedule
        self.prediction = prediction
        self.call = call if call is not None else calling_convention(network)
        self.shape = tuple(shape) if shape is not None else _configured_shape(network, self.call)
        self.time_scale = time_scale
        self.clip_x0 = clip_x0
        self.decoder = decoder
        self.encode = encode
        self.null_condition = dict(null_condition) if null_condition is not None else None
        self.scheduler_config = dict(scheduler_config) if scheduler_config is not None else None
        self.evaluations = 0

    @property
    def step_aware(self) -> tuple[StepAware, ...]:
        return step_aware_parts(self.network)

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        *,
        model_time: Tensor | None = None,
        output_scale: Tensor | None = None,
        **condition: Any,
    ) -> Tensor:
        """x0 `(B, ...)` in the dtype of `x_t`; see `interfaces.Denoiser`.

        `condition` goes to the network by name, floating-point tensors in its dtype. Raises TsAdaptError when there
        are per-sample times for another batch.
        """
        t = as_node_times(t)
        timestep = self.timestep(t if model_time is None else as_node_times(model_time), x_t)
        dtype = dtype_of(self.network, x_t.dtype)
        x, _, _ = seen(x_t, t, self.noise_schedule)
        raw = self.call(self.network, x.to(dtype), timestep, _cast(condition, x_t.device, dtype))
        check_output(raw, x_t)
        self.evaluations += 1
        x0 = x0_from_raw(raw, x_t, t, self.noise_schedule, self.prediction, output_scale)
        return x0.clamp(-1, 1) if self.clip_x0 else x0

    def timestep(self, time: Tensor, x: Tensor) -> Tensor:
        """What the network is told at `time` `()` or `(B,)`: `(B,)` float32 beside `x`."""
        batch = x.shape[0]
        if time.ndim > 1 or (time.ndim == 1 and time.shape[0] != batch):
            raise TsAdaptError(
                f"times have shape {tuple(time.shape)} for a batch of {batch}; expected () or ({batch},)"
            )
        told = self.noise_schedule.timestep(time) if self.time_scale is None else time * self.time_scale
        return told.to(device=x.device, dtype=torch.float32).expand(batch)


def check_output(raw: Tensor, x_t: Tensor) -> None:
    """TsAdaptError unless a network has answered `x_t` `(B, C, ...)` by as many numbers, or by twice the channels."""
    once, twice = x_t.shape, (len(x_t), 2 * x_t.shape[1], *x_t.shape[2:])
    if raw.shape not in (once, twice):
        raise TsAdaptError(
            f"the network answers states of shape {tuple(once)} by {tuple(raw.shape)}; expected are as many numbers, "
            "or twice the channels where it has learned a variance: give the shape that it was made for"
        )


def x0_from_raw(
    raw: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise_schedule: NoiseSchedule,
    prediction: str,
    output_scale: Tensor | None = None,
) -> Tensor:
    """x0 `(B, ...)`, in the dtype of `x_t`, from what a network has said about `x_t` at `t` `()` or `(B,)`.

    A learned variance, in a second half of the channels, is left out.
    """
    if raw.ndim == x_t.ndim and raw.shape[1] == 2 * x_t.shape[1]:
        raw = raw[:, : x_t.shape[1]]
    raw = raw.to(x_t.dtype)
    if output_scale is not None:
        raw = scale(torch.as_tensor(output_scale), raw)
    x0, d = to_x0(raw, *seen(x_t, t, noise_schedule), prediction), noise_schedule.data_std
    return x0 if d is None else d * x0


def seen(x_t: Tensor, t: Tensor, noise_schedule: NoiseSchedule) -> tuple[Tensor, Tensor, Tensor]:
    """What a network sees of `x_t` `(B, ...)` at `t` `()` or `(B,)`, and the alpha and sigma of that: see the head."""
    alpha, sigma, d = noise_schedule.alpha(t), noise_schedule.sigma(t), noise_schedule.data_std
    if d is None:
        return x_t, alpha, sigma
    c = ((alpha * d).square() + sigma.square()).rsqrt()
    return scale(c, x_t), c * alpha * d, c * sigma


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """`modules` in evaluation mode and frozen from now on; as they were before, should the block raise."""
    training = [(part, part.training) for module in modules for part in module.modules()]
    wanted = [(value, value.requires_grad) for module in modules for value in module.parameters()]
    try:
        for module in modules:
            module.eval().requires_grad_(False)
        yield
    except BaseException:
        for part, mode in training:
            part.training = mode
        for value, wants in wanted:
            value.requires_grad_(wants)
        raise


def step_aware_parts(network: nn.Module) -> tuple[StepAware, ...]:
    """What is attached to `network` and has to know the step: cachers."""
    if _STEP_AWARE not in vars(network) and "_orig_mod" not in network._modules:
        return ()  # nn.Module.__getattr__ is slow for what is missing
    parts: tuple[StepAware, ...] = getattr(network, _STEP_AWARE, ())
    return parts


def add_step_aware(network: nn.Module, part: StepAware) -> None:
    """Have `part` told the step by whoever samples with `network`."""
    setattr(network, _STEP_AWARE, (*step_aware_parts(network), part))


def remove_step_aware(network: nn.Module, part: StepAware) -> None:
    """The inverse of `add_step_aware`; without parts nothing is left on the network."""
    others = tuple(other for other in step_aware_parts(network) if other is not part)
    delattr(network, _STEP_AWARE)
    if others:
        setattr(network, _STEP_AWARE, others)


def argument_names(network: nn.Module) -> list[str]:
    """The names of the arguments of the network's forward: the state's, then the others."""
    forward: Any = type(getattr(network, "_orig_mod", network)).forward  # type: ignore[attr-defined]
    return list(inspect.signature(forward).parameters)[1:]


def time_argument(network: nn.Module) -> str | None:
    """The name of the argument by which `network` is told the time; None if it is not."""
    return next((name for name in TIMES if name in argument_names(network)[1:]), None)


def stacked(x: Any) -> Tensor:
    """The samples `(rows, ...)`, where a network is given a list of them, each `(C, 1, H, W)`, as Z-Image's is: or each
    with the pictures before it that it goes by."""
    if isinstance(x, Tensor):
        return x
    return torch.stack([one if isinstance(one, Tensor) else one[-1] for one in x]).squeeze(2)


def positional_call(network: nn.Module, x: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
    """network(x, timestep, **condition)."""
    return prediction_of(network(x, timestep, **condition))


def keyword_call(network: nn.Module, x: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
    """network(x, timestep=timestep, **condition): the transformers have other arguments in between."""
    return prediction_of(network(x, timestep=timestep, **condition))


def flux_call(network: nn.Module, x: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
    """Flux on latents `(B, C, H, W)`: 2x2 patches become tokens `(B, HW/4, 4C)` and back.

    Tokens are numbered by row and column, the text's all by zero; Flux multiplies its timestep by 1000 by itself.
    """
    patches = F.pixel_unshuffle(x, 2)
    rows, columns = torch.meshgrid(*(torch.arange(n, device=x.device) for n in patches.shape[2:]), indexing="ij")
    positions = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(x.dtype)
    text = condition["encoder_hidden_states"].shape[1]
    out = network(
        patches.flatten(2).transpose(1, 2),
        timestep=timestep / 1000,
        img_ids=positions,
        txt_ids=positions.new_zeros(text, 3),
        **condition,
    )
    return F.pixel_shuffle(prediction_of(out).transpose(1, 2).reshape(patches.shape), 2)


def calling_convention(network: nn.Module) -> NetworkCall:
    """How `network` wants to be called, from the argument names of its `forward`."""
    names = inspect.signature(network.forward).parameters
    if "img_ids" in names:
        return flux_call
    return keyword_call if "timestep" in names else positional_call


def prediction_of(out: Any) -> Tensor:
    """The raw prediction in what a network returns: a tensor, a tuple that begins with it, or an object with it."""
    out = getattr(out, "sample", out)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def with_prediction(out: Any, prediction: Tensor) -> Any:
    """What a network returns, with `prediction` for the raw one in it."""
    if isinstance(out, Tensor):
        return prediction
    if isinstance(out, dict):
        key = next(iter(out))
        return type(out)(**{**out, key: prediction})
    return (prediction, *out[1:])


def correction_of(network: nn.Module) -> nn.Module | None:
    """What corrects the answers of a quantized network, whose `left(batch)` is the standard deviation `(batch,)` of the
    noise in the latest one; None for any other network."""
    found: nn.Module | None = getattr(network, CORRECTION, None)
    return found


def _cast(condition: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Tensors of a condition on the device of the state, the floating-point ones in the network's precision."""
    cast: dict[str, Any] = each_tensor(
        condition, lambda value: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    )
    return cast


def _configured_shape(network: nn.Module, call: NetworkCall) -> tuple[int, ...]:
    config = getattr(network, "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if channels is None or size is None:
        raise TsAdaptError(
            f"the sample shape of {type(network).__name__} is not in its config; pass shape=(channels, height, width)"
        )
    if call is flux_call:
        channels //= 4
    return (channels, size, size) if isinstance(size, int) else (channels, *size)
