"""The derivative of a denoiser in the time that its network is told, at the scale at which schedules move times.

A network is told the time by sinusoids e_k(t) = (cos f_k t, sin f_k t), the fastest with a period of some six
timesteps, and most were trained at integer timesteps: what they do in between no loss has seen. There the fast
components change the output little and its derivative much, de/dt = f. A schedule moves a time by tens of timesteps;
what it has to know is the derivative averaged over such a distance, w, a share of all the times that the network knows:

    exact     dF/dt                                          what autograd gives
    slow      dF/de E[de/dt(t + w xi)],  xi ~ N(0, 1)        each component of e damped by exp(-(f_k w)^2 / 2)
    secant    (F(t + r_b) - F(t - r_b)) / 2 r_b              sample b of the batch; r_b spread over w / 2 .. 3 w / 2

The forward pass is the denoiser's own, and so are the derivatives in everything else (the state, alpha and sigma of t,
the output scale); only the derivative in the time told differs. `slow` costs nothing and needs a network
whose embedding of the time is a module: one that is given times `(B,)` and nothing else, and returns `(B, C)`, as
diffusers' `Timesteps`, the Fourier features of EDM and the embedders of DiT are; it is found by that behaviour.
`secant` takes any denoiser and costs two evaluations without gradient in each backward pass. Its distances differ from
sample to sample, so that a period of the network that happens to divide one does not stay in the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.interfaces import Denoiser, NoiseSchedule, TsAdaptError, as_node_times, unknown

WAYS = ("exact", "slow", "secant")
WIDTH = 0.04
"""w: 40 of 1000 timesteps."""
POINTS, REACH = 128, 4.0
"""The Gaussian mean is a sum over so many points within so many standard deviations, 2.5 timesteps apart."""
GOLDEN = 0.6180339887498949


class TimeDerivative:
    """`denoiser`, with its derivative in the time told to the network taken in one of `WAYS`.

    width  w, the share of the noise schedule's range over which the derivative is a mean

    Everything else is the denoiser's own. The evaluations of `secant` in the backward pass are not counted, as those
    of gradient checkpointing are not. Raises TsAdaptError for another way, a width that is not positive, `slow` for a
    denoiser without a module as its network (in the first call: for one without an embedding of the time), and `secant`
    for a network that caches from step to step.
    """

    def __init__(self, denoiser: Denoiser, way: str, width: float = WIDTH) -> None:
        if way not in WAYS:
            raise unknown("time derivative", way, WAYS)
        if not 0 < width <= 1:
            raise TsAdaptError(f"the width of the time derivative is {width}; expected a share of the times, in (0, 1]")
        if way == "slow" and not isinstance(getattr(denoiser, "network", None), nn.Module):
            raise TsAdaptError("the slow derivative needs a network that is a torch module; take secant")
        if way == "secant" and getattr(denoiser, "step_aware", None):
            raise TsAdaptError("a secant would run the network at times of its own, which a cache must not see")
        self.denoiser, self.way, self.width = denoiser, way, width
        self._embeddings: list[nn.Module] | None = None

    def __getattr__(self, name: str) -> Any:
        """`shape`, `network` and the like are the denoiser's."""
        if name == "denoiser":
            raise AttributeError(name)
        return getattr(self.denoiser, name)

    @property
    def noise(self) -> NoiseSchedule:
        return self.denoiser.noise

    @property
    def evaluations(self) -> int:
        return self.denoiser.evaluations

    @evaluations.setter
    def evaluations(self, count: int) -> None:
        self.denoiser.evaluations = count

    def decode(self, x: Tensor) -> Tensor:
        return self.denoiser.decode(x)

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        *,
        model_time: Tensor | None = None,
        output_scale: Tensor | None = None,
        **condition: Any,
    ) -> Tensor:
        """x0 `(B, ...)`, the denoiser's; see `interfaces.Denoiser`."""
        told = as_node_times(t if model_time is None else model_time)

        def denoise(x_t: Tensor, t: Tensor, told: Tensor | None, output_scale: Tensor | None) -> Tensor:
            return self.denoiser(x_t, t, model_time=told, output_scale=output_scale, **condition)

        if self.way == "exact" or not (torch.is_grad_enabled() and told.requires_grad):
            return denoise(x_t, t, model_time, output_scale)
        if self.way == "secant":
            return self._by_secant(denoise, x_t, as_node_times(t), told, output_scale)
        if self._embeddings is None:
            with self._uncounted(), torch.no_grad(), _found(self.network) as self._embeddings:
                denoise(x_t, t, model_time, output_scale)
        if not self._embeddings:
            raise TsAdaptError(
                f"{type(self.network).__name__} has no module that embeds the time; take the derivative secant"
            )
        with _averaged(self._embeddings, told, self.noise.reach(told.detach(), self.width)):
            return denoise(x_t, t, model_time, output_scale)

    def _by_secant(
        self, denoise: Callable[..., Tensor], x_t: Tensor, t: Tensor, told: Tensor, output_scale: Tensor | None
    ) -> Tensor:
        at = told.detach()
        place = (torch.arange(len(x_t), dtype=at.dtype, device=at.device) * GOLDEN) % 1
        reach = self.noise.reach(at, self.width) * (0.5 + place)
        above = (at + reach).clamp(max=self.noise.t_max)
        below = (at - reach).clamp(min=self.noise.t_min)
        fixed = x_t.detach(), t.detach()
        scale = output_scale.detach() if isinstance(output_scale, Tensor) else output_scale

        def evaluate(told: Tensor) -> Tensor:
            with self._uncounted(), torch.no_grad():
                return denoise(*fixed, told, scale)

        x0: Tensor = _Secant.apply(denoise(x_t, t, at, output_scale), told, evaluate, above, below)
        return x0

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        count = self.evaluations
        try:
            yield
        finally:
            self.evaluations = count


class _Secant(torch.autograd.Function):
    """x0 as it is; in the backward pass dx0/d(told) is the secant between the times `above` and `below` `(B,)`."""

    @staticmethod
    def forward(
        ctx: Any, x0: Tensor, told: Tensor, evaluate: Callable[[Tensor], Tensor], above: Tensor, below: Tensor
    ) -> Tensor:
        ctx.evaluate, ctx.shared = evaluate, told.ndim == 0
        ctx.save_for_backward(above, below)
        return x0.view_as(x0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        above, below = ctx.saved_tensors
        rise = (ctx.evaluate(above) - ctx.evaluate(below)).to(above) * gradient
        slope = rise.flatten(1).sum(1) / (above - below)
        return gradient, slope.sum() if ctx.shared else slope, None, None, None


class _Averaged(torch.autograd.Function):
    """An embedding `(n, C)` of times `(n,)` as it is; in the backward pass its derivative is the Gaussian mean."""

    @staticmethod
    def forward(ctx: Any, embedding: Tensor, times: Tensor, embed: Callable[[Tensor], Tensor], width: Tensor) -> Tensor:
        ctx.embed = embed
        ctx.save_for_backward(times, width)
        return embedding.view_as(embedding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        times, width = ctx.saved_tensors
        xi = torch.linspace(-REACH, REACH, POINTS, dtype=times.dtype, device=times.device)
        density = torch.exp(-xi.square() / 2)
        weight = density * xi / (density * xi.square()).sum()
        moved = times[:, None] + width[:, None] * xi
        with torch.no_grad():
            around = ctx.embed(moved.flatten()).unflatten(0, moved.shape).to(weight)
        slope = torch.einsum("q,nqc->nc", weight, around) / width[:, None]
        return gradient, (gradient.to(slope) * slope).sum(1), None, None


@contextmanager
def _found(network: nn.Module) -> Iterator[list[nn.Module]]:
    """The modules that embed times in the calls of `network` within the block; of nested ones the outermost."""
    found: list[nn.Module] = []

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if _times_alone(args, kwargs) and isinstance(out, Tensor) and out.ndim == 2 and len(out) == len(args[0]):
            inside = set(module.modules())  # of which those that were called were found before
            found[:] = [other for other in found if other not in inside] + [module]

    handles = [
        module.register_forward_hook(after, with_kwargs=True) for module in network.modules() if module is not network
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _times_alone(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a module is given real numbers `(n,)` first, and no other tensor."""
    first, *others = [*args, *kwargs.values()] or [None]
    if not args or not isinstance(first, Tensor) or any(isinstance(other, Tensor | dict) for other in others):
        return False
    return first.ndim == 1 and first.is_floating_point()


@contextmanager
def _averaged(embeddings: Sequence[nn.Module], told: Tensor, reach: Tensor) -> Iterator[None]:
    """Within the block the derivative of `embeddings` in the time `told` is the mean over a Gaussian.

    reach  its standard deviation, in the unit and shape of `told`, `()` or `(B,)`
    """
    waiting: dict[nn.Module, Tensor] = {}

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args[0].requires_grad:  # another number than the time: a guidance scale, a size
            return None
        waiting[module] = args[0]
        return args[0].detach(), *args[1:]

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
        times = waiting.pop(module, None)
        if times is None:
            return None
        (unit,) = torch.autograd.grad(times.sum(), told, retain_graph=True)
        copies = len(times) // told.numel()  # guided, the batch is there twice
        width = (reach * unit.abs() / copies).to(times).reshape(-1).repeat(copies)
        embedding: Tensor = _Averaged.apply(out, times, lambda t: module.forward(t, *args[1:], **kwargs), width)
        return embedding

    handles = [module.register_forward_pre_hook(before) for module in embeddings]
    handles += [module.register_forward_hook(after, with_kwargs=True) for module in embeddings]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
