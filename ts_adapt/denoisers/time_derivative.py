"""The derivative of a denoiser in the time that its network is told, at the scale at which schedules move times.

A network is told the time by sinusoids e_k(t) = (cos f_k t, sin f_k t), the fastest with a period of some six
timesteps, and most were trained at integer timesteps: what they do in between no loss has seen. There the fast
components change the output little and its derivative much, de/dt = f. A schedule moves a time by tens of timesteps;
what it has to know is the derivative averaged over such a distance, w, a share of all times as the network knows them:

    exact     dF/dt                                 what autograd gives
    slow      dF/de s(t)                            s  the slope of the line that fits e best around t, places weighted
                                                       by exp(-(t' - t)^2 / 2 w^2): each component of e damped by
                                                       exp(-(f_k w)^2 / 2); of t' within the range of times alone
    secant    (F(t + r_b) - F(t - r_b)) / 2 r_b     sample b of the batch; r_b spread over w / 2 .. 3 w / 2

The forward pass is the denoiser's own, and so are the derivatives in everything else (the state, alpha and sigma of t,
the output scale); only the derivative in the time told differs. `slow` needs a network whose embedding of the time is a
module: one that is given times `(n,)` and nothing else, and returns `(n, C)`, as diffusers' `Timesteps`, the Fourier
features of EDM and the embedders of DiT are. It is found by that behaviour, in two passes at the ends of the times when
it is first needed; afterwards it costs a few rows of the embedding. Where the time enters by another road as well, that
road keeps its exact derivative. `secant` takes any denoiser and costs two evaluations without gradient in each backward
pass. Its distances differ from sample to sample, so that a period of the network that divides one does not stay in the
mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.denoisers.time_embedding import offsets_now, watched
from ts_adapt.denoisers.wrapped import Wrapped
from ts_adapt.errors import TsAdaptError, unknown
from ts_adapt.interfaces import (
    DERIVATIVE_WIDTH,
    DERIVATIVES,
    Advance,
    Around,
    Condition,
    Denoiser,
    Loop,
    Solver,
    StepPolicy,
)
from ts_adapt.numerics import as_node_times

POINTS, REACH = 128, 4.0
"""The line is fitted to so many places within so many w, 2.5 timesteps apart."""
GOLDEN = 0.6180339887498949
Range = tuple[float, float]
"""The lowest and the highest time that an embedding is given, in its own unit."""


class TimeDerivative(Wrapped):
    """`denoiser`, with its derivative in the time told to the network taken in one of `DERIVATIVES`.

    width  w, the share of all times over which the derivative is a mean

    Everything else is the denoiser's own. The evaluations of `secant` in the backward pass are not counted, as those
    of gradient checkpointing are not. Raises TsAdaptError for another way, a width that is not positive, `slow` for a
    denoiser without a module as its network (in the first call: for one without an embedding of the time), and `secant`
    for a network that caches from step to step.
    """

    def __init__(self, denoiser: Denoiser, way: str, width: float = DERIVATIVE_WIDTH) -> None:
        if way not in DERIVATIVES:
            raise unknown("time derivative", way, DERIVATIVES)
        if not 0 < width <= 1:
            raise TsAdaptError(f"the width of the time derivative is {width}; expected a share of the times, in (0, 1]")
        if way == "slow" and denoiser.network is None:
            raise TsAdaptError("the slow derivative needs a network that is a torch module; take secant")
        if way == "secant" and denoiser.step_aware:
            raise TsAdaptError("a secant would run the network at times of its own, which a cache must not see")
        super().__init__(denoiser)
        self.way, self.width = way, width
        self._embeddings: dict[nn.Module, Range] | None = None

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
        t = as_node_times(t)
        told = t if model_time is None else as_node_times(model_time)

        def denoise(x_t: Tensor, t: Tensor, told: Tensor | None, output_scale: Tensor | None) -> Tensor:
            return self.denoiser(x_t, t, model_time=told, output_scale=output_scale, **condition)

        if self.way == "exact" or not (torch.is_grad_enabled() and told.requires_grad):
            return denoise(x_t, t, model_time, output_scale)
        if self.way == "secant":
            return self._by_secant(denoise, x_t, t, told, output_scale)
        if self._embeddings is None:
            self._embeddings = self._found(lambda told: denoise(x_t, t, told, output_scale), told)
        with _smoothed(self._embeddings, self.width):
            return denoise(x_t, t, None if model_time is None else told, output_scale)

    @property
    def loop(self) -> Loop | None:  # type: ignore[override]
        """The denoiser's own, where each call of the network has the derivative."""
        inner = self.denoiser.loop
        return None if inner is None else partial(self._loop, inner)

    def _loop(
        self, inner: Loop, solver: Solver, policy: StepPolicy, x_T: Tensor, condition: Condition, advance: Advance, *,
        checkpoint: bool = False, around: Around | None = None,
    ) -> None:  # fmt: skip
        if self.way != "exact" and torch.is_grad_enabled():
            if self.way == "slow" and self._embeddings is None:
                start = torch.zeros((), dtype=torch.float64)
                self._embeddings = self._found(lambda told: self.denoiser(x_T, told, **condition), start)
            around = partial(self._called, len(x_T))
        inner(solver, policy, x_T, condition, advance, checkpoint=checkpoint, around=around)

    def _called(
        self, samples: int, evaluate: Callable[[Tensor], Tensor], told: Tensor, divisor: float | None
    ) -> Tensor:
        """What the network answers in a loop, see `interfaces.Around`; rows are copies of the `samples`, in turn."""
        if not (torch.is_grad_enabled() and told.requires_grad):
            return evaluate(told)
        if self.way == "slow":
            with _smoothed(self._embeddings or {}, self.width):
                return evaluate(told)
        if divisor is None:
            raise TsAdaptError("in this pipeline the network is not told each sample's time; take the derivative slow")
        at = told.detach()
        noise_schedule = self.noise_schedule
        below, above = self._ends(noise_schedule.time_of_timestep(at.double() * divisor), samples)

        def quietly(told: Tensor) -> Tensor:
            with torch.no_grad():
                return evaluate(told)

        ends = [(noise_schedule.timestep(time) / divisor).to(at) for time in (above, below)]
        answer: Tensor = _Secant.apply(evaluate(at), told, quietly, *ends)
        return answer

    def _found(self, denoise: Callable[[Tensor], Tensor], told: Tensor) -> dict[nn.Module, Range]:
        """The modules that embed the time, and the range of what each is given between the ends of the times.

        One that is met at one end alone, as that of an expert for some of the times is, has the range of all.
        """
        assert self.network is not None
        networks = [self.network, *(part for part in self.parts.values() if type(part) is type(self.network))]
        met: list[dict[nn.Module, float]] = []
        for end in (self.noise_schedule.t_min, self.noise_schedule.t_max):
            with self._uncounted(), torch.no_grad(), watched(networks) as given:
                denoise(torch.full_like(told, end))
            met.append(given.times)
        first, last = met
        found = {
            module: [given[module] for given in met if module in given]
            for module in {**first, **last}
            if first.get(module) != last.get(module)
        }
        if not found:
            raise TsAdaptError(
                f"{type(self.network).__name__} has no module that embeds the time; take the derivative secant"
            )
        every = [time for times in found.values() for time in times]
        return {
            module: (min(times), max(times)) if len(times) == 2 else (min(every), max(every))
            for module, times in found.items()
        }

    def _by_secant(
        self, denoise: Callable[..., Tensor], x_t: Tensor, t: Tensor, told: Tensor, output_scale: Tensor | None
    ) -> Tensor:
        at = told.detach()
        below, above = self._ends(at, len(x_t))
        fixed = x_t.detach(), t.detach()
        scale = output_scale.detach() if isinstance(output_scale, Tensor) else output_scale
        added = offsets_now()

        def evaluate(told: Tensor) -> Tensor:
            with self._uncounted(), torch.no_grad(), ExitStack() as adding:
                for embedding, value in added:
                    adding.enter_context(embedding.adding(value))
                return denoise(*fixed, told, scale)

        x0: Tensor = _Secant.apply(denoise(x_t, t, at, output_scale), told, evaluate, above, below)
        return x0

    def _ends(self, at: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """The times below and above `at` `()` or `(rows,)` between which the secant is: r_b is that of the sample."""
        rows = torch.arange(max(samples, at.numel()), device=at.device) % samples
        place = (rows.to(at.dtype) * GOLDEN) % 1
        reach = self.noise_schedule.reach(at, self.width) * (0.5 + place)
        return (at - reach).clamp(min=self.noise_schedule.t_min), (at + reach).clamp(max=self.noise_schedule.t_max)

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
        rise = (ctx.evaluate(above) - ctx.evaluate(below)) * gradient
        slope = rise.flatten(1).sum(1, dtype=above.dtype).to(above.device) / (above - below)
        return gradient, slope.sum() if ctx.shared else slope, None, None, None


class _Smoothed(torch.autograd.Function):
    """An embedding `(n, C)` of times `(n,)` as it is; in the backward pass its derivative is that of the line around.

    width  the standard deviation of the places, in the unit of the times, which stay within `ends`
    """

    @staticmethod
    def forward(
        ctx: Any, embedding: Tensor, times: Tensor, embed: Callable[[Tensor], Tensor], width: float, ends: Range
    ) -> Tensor:
        ctx.embed, ctx.width, ctx.ends = embed, width, ends
        ctx.save_for_backward(times)
        return embedding.view_as(embedding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (times,) = ctx.saved_tensors
        xi = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64, device=times.device)
        places = times.double()[:, None] + ctx.width * xi
        with torch.no_grad():
            around = ctx.embed(places.flatten().to(times.dtype)).unflatten(0, places.shape).double()
        lowest, highest = ctx.ends
        usable = (places >= lowest) & (places <= highest) & torch.isfinite(around).all(-1)
        weight = torch.exp(-xi.square() / 2) * usable
        total = weight.sum(1, keepdim=True).clamp_min(1e-30)
        offset = places - (weight * places).sum(1, keepdim=True) / total
        weight = weight * offset
        spread = (weight * offset).sum(1, keepdim=True).clamp_min(1e-30)
        slope = torch.einsum("nq,nqc->nc", weight, around.masked_fill(~usable[..., None], 0.0)) / spread
        return gradient, (gradient.double() * slope).sum(1).to(times.dtype), None, None, None


@contextmanager
def _smoothed(embeddings: Mapping[nn.Module, Range], width: float) -> Iterator[None]:
    """Within the block the derivative of `embeddings` in what they are given is that of `_Smoothed`.

    Raises TsAdaptError at its end if none of them was called: the network is another than the one they are of.
    """
    waiting: dict[nn.Module, Tensor] = {}
    met: set[nn.Module] = set()

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        met.add(module)
        if not args[0].requires_grad:
            return None
        waiting[module] = args[0]
        return args[0].detach(), *args[1:]

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
        times = waiting.pop(module, None)
        if times is None:
            return None
        ends = embeddings[module]

        def embed(times: Tensor) -> Any:
            return module.forward(times, *args[1:], **kwargs)

        embedding: Tensor = _Smoothed.apply(out, times, embed, width * (ends[1] - ends[0]), ends)
        return embedding

    handles = [module.register_forward_pre_hook(before) for module in embeddings]
    handles += [module.register_forward_hook(after, with_kwargs=True) for module in embeddings]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not met:
        raise TsAdaptError("the modules that embed the time are no longer those of the network; search again")
