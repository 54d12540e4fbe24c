"""A pipeline's own loop tells cachers the step, whichever scheduler of diffusers it runs on.

    scheduler.set_timesteps(...)    the run before is over, however it ended
    network(x, t)                   the first call begins a run, at the place of t, told as such or from 0 to 1: of the
                                    steps that are left
    scheduler.step(...)             the calls that follow belong to the next step; behind the last the run is over

A scheduler that takes two evaluations a step (Heun) is called twice for each. While a schedule is attached to the
pipeline it tells the step by itself (`schedulers.hook`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.denoisers.network import ATTACHMENT, argument_names, stacked, step_aware_parts, time_argument
from ts_adapt.interfaces import TsAdaptError

NETWORKS = ("unet", "transformer")
COPIES = (2, 3)
"""How often a guided network sees each sample."""


@contextmanager
def heard(pipe: Any) -> Iterator[nn.Module]:
    """The UNet or transformer of `pipe`, whose cachers are told the step of its loop for as long as the block runs.

    Raises TsAdaptError for a pipeline that has neither.
    """
    network = next((part for name in NETWORKS if isinstance(part := getattr(pipe, name, None), nn.Module)), None)
    if network is None:
        raise TsAdaptError(
            f"{type(pipe).__name__} has neither a UNet nor a transformer, and cachers are put on one; leave the cacher "
            "out"
        )
    loop = _Loop(pipe, network)
    handle = network.register_forward_pre_hook(loop.call, with_kwargs=True, prepend=True)
    try:
        loop.listen_to(pipe.scheduler)
        yield network
    finally:
        handle.remove()
        loop.listen_to(None)


class _Loop:
    """What is known of the loop of `pipe`.

    coming       whether the next call of the network begins a run
    done, total  of the run: how many of the scheduler's steps are done, of how many
    """

    def __init__(self, pipe: Any, network: nn.Module) -> None:
        self.pipe, self.network = pipe, network
        self.scheduler: Any = None
        self.coming, self.done, self.total = False, 0, 0

    def listen_to(self, scheduler: Any) -> None:
        """Hear the calls of `scheduler` (None: of none), and no more those of the one before."""
        if self.scheduler is not None:
            for name in ("set_timesteps", "step"):
                vars(self.scheduler).pop(name, None)
        self.scheduler, self.coming = scheduler, True
        if scheduler is not None:
            scheduler.set_timesteps = self._heard(scheduler, "set_timesteps", self._over)
            scheduler.step = self._heard(scheduler, "step", self._stepped)

    def _heard(self, scheduler: Any, name: str, then: Callable[[], None]) -> MethodType:
        """The method of `scheduler`, after which `then` is called; that of a copy of the scheduler is its own."""
        method = getattr(type(scheduler), name)

        @functools.wraps(method)
        def heard(this: Any, *args: Any, **kwargs: Any) -> Any:
            made = method(this, *args, **kwargs)
            if this is self.scheduler:
                then()
            return made

        return MethodType(heard, scheduler)

    def call(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of the network is to come: a hook before its forward."""
        parts = step_aware_parts(network)
        if hasattr(self.pipe, ATTACHMENT) or not parts:
            return
        if self.pipe.scheduler is not self.scheduler:
            self.listen_to(self.pipe.scheduler)
        order: int = getattr(self.scheduler, "order", 1)
        if self.coming:
            names = argument_names(network)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            x, t = stacked(given[names[0]]), given[time_argument(network) or "timestep"]
            self.coming, self.done, self.total = False, 0, self._left_from(t)
            for part in parts:
                part.begin(-(-self.total // order), len(x) // self._copies(x))
        if self.done < self.total:
            for part in parts:
                part.at(self.done // order)

    def _left_from(self, t: Any) -> int:
        """How many of the scheduler's steps there are from the timestep on that the network is told as `t`."""
        timesteps: Tensor = self.scheduler.timesteps.double()
        t = torch.as_tensor(t, device=timesteps.device).double().flatten()[0]
        away = torch.stack([(timesteps - told).abs() for told in (t, 1000 * t, 1000 * (1 - t))])
        return len(timesteps) - int(away.min(0).values.argmin())

    def _copies(self, x: Tensor) -> int:
        """How often each sample is among the rows of `x`."""
        if getattr(self.pipe, "do_classifier_free_guidance", None) is False:
            return 1
        able = (copies for copies in COPIES if len(x) % copies == 0)
        return next((n for n in able if all(torch.equal(x.chunk(n)[0], other) for other in x.chunk(n))), 1)

    def _stepped(self) -> None:
        self.done += 1
        if self.done == self.total:
            self._end()

    def _over(self) -> None:
        self.coming = True
        self._end()

    def _end(self) -> None:
        if not hasattr(self.pipe, ATTACHMENT):
            for part in step_aware_parts(self.network):
                part.end()
