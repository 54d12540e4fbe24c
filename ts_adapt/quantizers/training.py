"""Training what a quantizer has put into a network: quantization-aware training, and fine-tuning to a teacher.

    diffusion     E || F^(x_t, t) - target ||       x_t = alpha x_0 + sigma eps, target as predicted, t uniform
                                                    among the times as the network knows them (of EDM in log sigma)
    teacher       E || F^(x_t, t) - F(x_t, t) ||    F in full precision, on the same x_t
    reproduction  || F^(call) - F(call) ||^2        on a calibration set, with what F said to it

    rate(k)       lr min(1, (k + 1) / (W + 1)) decay(k / K)       of step k of K, W of them to warm up
    average       the weights' exponential moving average (`numerics.warming_average`), which is what remains

F^ is the quantized network; || . || is the mean of squares (l2) or of absolute values (l1). x_0 is a latent where the
model has latents. Trained are parameters of its quantized layers alone (learned weights, their scales,
biases, predictors of activation scales), so that it can be restored exactly; norms and layers in full precision stay.

A batch is a function of its number: a run that was killed goes on from its last checkpoint and ends where it would
have ended. P processes (`distributed`) take P batches a step, one each, whose mean gradient the step is along; the
first process reads and writes checkpoints.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ts_adapt.denoisers.network import NetworkDenoiser, prediction_of, seen
from ts_adapt.distributed import add_gradients, agree, first, rank, total_of, world
from ts_adapt.errors import TsAdaptError, unknown
from ts_adapt.interfaces import Condition, Denoiser
from ts_adapt.numerics import combine, each_tensor, warming_average
from ts_adapt.parameterization import from_x0
from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.layers.quantized_layer import QuantizedLayer
from ts_adapt.quantizers.quantization import quantization_of, quantized_layers
from ts_adapt.sampling import generator_for
from ts_adapt.storage.checkpoint import Checkpoint

Batches = Callable[[int], Any]
"""number -> batch, always the same for a number."""

Loss = Callable[[nn.Module, Any, Generator], Tensor]
"""(network, batch, what its noise is drawn from) -> `()`."""

NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l2": F.mse_loss, "l1": F.l1_loss}
DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
"""How the rate of learning falls, by the share of the steps that is done."""
WHAT: dict[str, Callable[[QuantizedLayer], Sequence[nn.Module | None]]] = {
    "all": lambda layer: [layer],
    "weights": lambda layer: [layer.stored],
    "activations": lambda layer: [layer.activation],
}


@dataclass
class FineTuneOptions:
    """How a quantized network is trained."""

    steps: int = 1000
    lr: float = 1e-4
    """Of Adam, at its highest."""
    warm_up: int = 0
    """Steps over which the rate rises."""
    schedule: str = "cosine"
    """How it falls, of `DECAYS`."""
    ema: float = 0.0
    """Decay of the moving average of the weights; 0: the last weights remain."""
    train: str = "all"
    """all, weights, or activations (the predictors of their scales alone)."""
    clip: float = 1.0
    """The largest norm of a gradient."""
    checkpoint_every: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Images:
    """x0 `(B, ...)` in the space of the diffusion, and the condition that goes with it."""

    x0: Tensor
    condition: Condition

    def to(self, device: torch.device) -> Images:
        return Images(self.x0.to(device), each_tensor(self.condition, lambda value: value.to(device)))


def image_batches(
    x0: Tensor, batch_size: int, *, condition: Condition | None = None, null: Condition | None = None,
    dropout: float = 0.0, seed: int = 0,
) -> Batches:  # fmt: skip
    """Batches of `x0` `(n, ...)` and of the tensors `(n, ...)` in `condition`, shuffled anew at each pass.

    null     what stands in place of a condition for none, as of `Guided`
    dropout  the share of the samples that have it, drawn anew for each batch

    Raises TsAdaptError for no images, a batch size that they do not fill, or a condition of another length.
    """
    n, condition = len(x0), dict(condition or {})
    if not 0 < batch_size <= n:
        raise TsAdaptError(f"batch_size is {batch_size} for {n} images; expected between 1 and the number of images")
    for name, value in condition.items():
        if isinstance(value, Tensor) and len(value) != n:
            raise TsAdaptError(f"the condition {name!r} has {len(value)} rows for {n} images; give one for each image")
    each = n // batch_size

    def batch(number: int) -> Images:
        order = torch.randperm(n, generator=generator_for(seed, number // each, stream=1))
        rows = order[number % each * batch_size :][:batch_size]
        dropped = torch.rand(batch_size, generator=generator_for(seed, number, stream=4)) < dropout
        chosen: dict[str, Any] = each_tensor(condition, lambda value: value[rows.to(value.device)])
        for name in (null or {}).keys() & chosen.keys():
            chosen[name] = _without(chosen[name], (null or {})[name], dropped)
        return Images(x0[rows.to(x0.device)], chosen)

    return batch


def _without(value: Any, none: Any, dropped: Tensor) -> Any:
    """`value` `(B, ...)` with `none` in the rows `dropped` `(B,)`; of a dict, part by part."""
    if isinstance(value, Mapping):
        return {name: _without(part, none[name], dropped) if name in none else part for name, part in value.items()}
    there = dropped.to(value.device).view(-1, *[1] * (value.ndim - 1))
    return torch.where(there, torch.as_tensor(none).to(value), value)


def reproduction_batches(network: nn.Module, calls: Sequence[Call], batch_size: int, seed: int = 0) -> Batches:
    """Pairs of a call and what `network`, as it is now, says to it: `batch_size` samples of one of `calls`."""
    with torch.no_grad():
        said = [call.run(network).detach() for call in calls]

    def batch(number: int) -> tuple[Call, Tensor]:
        index = number % len(calls)
        generator = generator_for(seed, number, stream=2)
        rows = torch.randperm(calls[index].batch, generator=generator)[:batch_size]
        return calls[index].rows(rows), said[index][rows]

    return batch


def reproduction_loss(network: nn.Module, batch: tuple[Call, Tensor], generator: Generator) -> Tensor:
    call, said = batch
    return F.mse_loss(call.run(network), said)


def diffusion_loss(denoiser: NetworkDenoiser, norm: str = "l2") -> Loss:
    """Of batches of `Images`, for the network of `denoiser`."""

    def loss(network: nn.Module, batch: Images, generator: Generator) -> Tensor:
        x_t, t = _noised(denoiser, batch.x0, generator)
        clean = batch.x0.double() / (denoiser.noise_schedule.data_std or 1.0)
        x, alpha, sigma = seen(x_t.double(), t, denoiser.noise_schedule)
        target = from_x0(clean, x, alpha, sigma, denoiser.prediction).to(x_t.dtype)
        raw = denoiser.call(network, x.to(x_t.dtype), denoiser.timestep(t, x_t), dict(batch.condition))
        return NORMS[norm](raw[:, : target.shape[1]], target)

    return loss


def teacher_loss(denoiser: Denoiser, teacher: nn.Module, norm: str = "l2") -> Loss:
    """Of batches of `Images`, at whatever `denoiser` calls its network for, guidance included.

    teacher  the network in full precision, without hooks
    """

    def loss(network: nn.Module, batch: Images, generator: Generator) -> Tensor:
        calls, said = _calls(denoiser, network, *_noised(denoiser, batch.x0, generator), batch.condition)
        with torch.no_grad():
            wanted = [call.run(teacher) for call in calls]
        return torch.stack([NORMS[norm](a, b) for a, b in zip(said, wanted, strict=True)]).mean()

    return loss


def plain_copy(network: nn.Module) -> nn.Module:
    """A copy of `network` without its hooks, which tell it the time in a pipeline, say: its calls are told already."""
    hooks = {id(value): type(value)() for key, value in vars(network).items() if key.endswith(("hooks", "with_kwargs"))}
    return copy.deepcopy(network, hooks)


def _calls(
    denoiser: Denoiser, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition
) -> tuple[list[Call], list[Tensor]]:
    """The calls of `network` by which `denoiser` finds x0 of `x_t` `(B, ...)` at `t`, and what it said to each."""
    calls, said = [], []

    def heard(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], answer: Any) -> None:
        calls.append(Call.made(network, args, kwargs))
        said.append(prediction_of(answer))

    handle = network.register_forward_hook(heard, with_kwargs=True)
    try:
        denoiser(x_t, t, **condition)
    finally:
        handle.remove()
    return calls, said


def fine_tune(
    network: nn.Module,
    batches: Batches,
    loss: Loss,
    options: FineTuneOptions | None = None,
    *,
    checkpoint: Path | None = None,
    tensorboard: Path | None = None,
    progress: bool = True,
) -> list[float]:
    """Train the quantized `network` in place; the losses of all steps, those before a resumption included.

    checkpoint   the file of a training under way, which is gone on with; None: none is kept
    tensorboard  the folder for the losses; None: they are not written

    Raises TsAdaptError where nothing can be trained, where the loss is not finite, and for another training's file.
    """
    options = options or FineTuneOptions()
    trained, decay = trainable(network, options.train), DECAYS[options.schedule]
    average = {name: p.detach().clone() for name, p in trained.items()} if options.ema else {}
    remember = warming_average(options.ema)
    device, of = next(iter(trained.values())).device, quantization_of(network)
    learned = {name: value for name, value in asdict(options).items() if name != "checkpoint_every"}
    about = {"options": learned, "method": of.method, "quantizer": of.options, "network": of.fingerprint}
    kept = Checkpoint(checkpoint, about)
    logged = {} if tensorboard is None else {"log_with": "tensorboard", "project_dir": str(tensorboard.parent)}
    accelerator = Accelerator(cpu=device.type == "cpu", **logged)
    accelerator.init_trackers("" if tensorboard is None else tensorboard.name)
    required = {name: p.requires_grad for name, p in network.named_parameters()}
    network.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    try:
        optimizer = torch.optim.Adam(trained.values(), lr=options.lr)
        losses = _resumed(kept, {"trained": trained, "average": average}, trained, optimizer)
        agree(trained.values())
        steps = range(len(losses), options.steps)
        bar = tqdm(steps, desc="fine-tuning", unit="step", disable=not progress, leave=False)
        for step in bar:
            for group in optimizer.param_groups:
                rising = min(1.0, (step + 1) / (options.warm_up + 1))
                group["lr"] = options.lr * rising * decay(step / options.steps)
            number = step * world() + rank()
            batch = batches(number)
            batch = batch.to(device) if isinstance(batch, Images) else batch
            value = loss(network, batch, generator_for(options.seed, number, stream=3))
            if not bool(torch.isfinite(value)):
                raise TsAdaptError(
                    f"the loss is {float(value.detach())} at step {step}; take a smaller lr than {options.lr}"
                )
            optimizer.zero_grad()
            (value / world()).backward()
            add_gradients(trained.values())
            nn.utils.clip_grad_norm_(trained.values(), options.clip)
            optimizer.step()
            for name, mean in average.items():
                mean.copy_(remember(mean, trained[name].detach(), step))
            losses.append(float(total_of(value.detach()) / world()))
            accelerator.log({"train/loss": losses[-1]}, step=step)
            bar.set_postfix(loss=f"{losses[-1]:.4g}")
            due = (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps
            if due and rank() == 0:
                kept.save({"trained": trained, "average": average}, {"losses": losses}, optimizer)
        for name, mean in average.items():
            trained[name].data.copy_(mean)
    finally:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(required[name])
            parameter.grad = None
        for tracker in accelerator.trackers:  # the processes go on together: no `end_training`, which parts them
            tracker.finish()
    return losses


def trainable(network: nn.Module, what: str = "all") -> dict[str, nn.Parameter]:
    """The parameters of the quantized layers that are to be trained, by name; TsAdaptError if there are none."""
    if what not in WHAT:
        raise unknown("part to train", what, WHAT)
    chosen = {id(p) for _, layer in quantized_layers(network) for m in WHAT[what](layer) if m for p in m.parameters()}
    biases = {id(layer.bias) for _, layer in quantized_layers(network)}
    if not chosen - biases:
        raise TsAdaptError(
            f"{quantization_of(network).method} has left nothing to train ({what}) in {type(network).__name__}; "
            "quantize by tdq, with mode qat for weights, and do not freeze before"
        )
    return {name: p for name, p in network.named_parameters() if id(p) in chosen}


def _noised(denoiser: Denoiser, x0: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """x_t `(B, ...)` and its times `(B,)`; one for the whole batch `()` in a loop of a denoiser's own, which may have
    no others."""
    noise_schedule = denoiser.noise_schedule
    share = torch.rand(x0.shape[0], generator=generator, dtype=torch.float64)
    t = noise_schedule.at_share(share).to(x0.device)
    t = t if denoiser.loop is None else t[0]
    eps = torch.randn(x0.shape, generator=generator, dtype=torch.float32).to(x0)
    return combine((noise_schedule.alpha(t), x0), (noise_schedule.sigma(t), eps)), t


def _resumed(
    kept: Checkpoint, states: dict[str, Any], trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[float]:
    """Go on from what was `kept` of `states`, where there is something; the losses until then."""
    found = first(lambda: kept.load(states, trained.values(), {"losses": None}))
    if found is None:
        return []
    for group, tensors in states.items():
        for name, tensor in tensors.items():
            tensor.data.copy_(found.states[group][name])
    found.give(optimizer)
    return found.progress["losses"]
