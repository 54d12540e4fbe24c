"""A pipeline's own loop tells cachers the step, whichever scheduler of diffusers it runs on.

    scheduler.set_timesteps(...)    the run before is over, however it ended
    network(x, t)                   the first call begins a run, at the place of t, told as such or from 0 to 1: of the
                                    steps that are left
    scheduler.step(...)             the calls that follow belong to the next step; behind the last the run is over

A scheduler that takes two evaluations a step (Heun) is called twice for each. A loop that calls its network several
times a step (for each view, or for a second look) is refused, but for caches that tell these calls apart. While a
schedule is attached to the pipeline it tells the step by itself (`schedulers.hook`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.cachers.cacher import Cacher
from ts_adapt.denoisers.network import ATTACHMENT, argument_names, stacked, step_aware_parts, time_argument
from ts_adapt.errors import TsAdaptError

NETWORKS = ("unet", "transformer")
COPIES = (2, 3)
"""How often a guided network sees each sample."""


@contextmanager
def heard(pipe: Any) -> Iterator[nn.Module]:
    """The UNet or transformer of `pipe`, whose cachers are told the step of its loop for as long as the block runs.

    Raises TsAdaptError for a pipeline that has neither, and for one that is heard already, or shares its network with
    one.
    """
    network = next((part for name in NETWORKS if isinstance(part := getattr(pipe, name, None), nn.Module)), None)
    if network is None:
        raise TsAdaptError(
            f"{type(pipe).__name__} has neither a UNet nor a transformer, and cachers are put on one; leave the cacher "
            "out"
        )
    if any(isinstance(getattr(hook, "__self__", None), _Loop) for hook in network._forward_pre_hooks.values()):
        raise TsAdaptError("cachers are attached to this pipeline already; give all of them in one attached(pipe, ...)")
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
    called       whether the network was called since the last of them
    first        the time that it was told in the first
    kind         the class of the scheduler
    """

    def __init__(self, pipe: Any, network: nn.Module) -> None:
        self.pipe, self.network = pipe, network
        self.scheduler: Any = None
        self.kind: type = object
        self.coming, self.called, self.done, self.total = False, False, 0, 0
        self.first: Any = None

    def listen_to(self, scheduler: Any) -> None:
        """Hear the calls of `scheduler` (None: of none), and no more those of the one before."""
        if self.scheduler is not None:
            self.scheduler.__class__ = self.kind
        self.scheduler, self.coming = scheduler, True
        if scheduler is not None:
            kind = self.kind = type(scheduler)
            methods = {"set_timesteps": self._over, "step": self._stepped}
            heard = {name: self._heard(getattr(kind, name), then) for name, then in methods.items()}
            scheduler.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, **heard})

    def _heard(self, method: Callable[..., Any], then: Callable[[], None]) -> Callable[..., Any]:
        """The method of the scheduler's class, after which `then` is called; of a copy of the scheduler it is not."""

        @functools.wraps(method)
        def heard(this: Any, *args: Any, **kwargs: Any) -> Any:
            made = method(this, *args, **kwargs)
            if this is self.scheduler:
                then()
            return made

        return heard

    def call(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of the network is to come: a hook before its forward."""
        parts = step_aware_parts(network)
        if hasattr(self.pipe, ATTACHMENT) or not parts:
            return
        if self.pipe.scheduler is not self.scheduler:
            self.listen_to(self.pipe.scheduler)
        order: int = getattr(self.scheduler, "order", 1)
        names = argument_names(network)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        t = given[time_argument(network) or "timestep"]
        if self.coming:
            x = stacked(given[names[0]])
            self.coming, self.called, self.done, self.first, self.total = False, False, 0, _one(t), self._left_from(t)
            for part in parts:
                part.begin(-(-self.total // order), len(x) // self._copies(x))
        if self.done < self.total:
            if any(isinstance(part, Cacher) and part.once_a_step for part in parts) and self._again(t):
                raise several_calls(self.pipe)
            self.called = True
            for part in parts:
                part.at(self.done // order)

    def _again(self, t: Any) -> bool:
        """Whether the call at `t` is of a step that had one: it is no other's yet, or is told the time of the first."""
        if self.called or self.done != 1:
            return self.called
        first, second = self.scheduler.timesteps[len(self.scheduler.timesteps) - self.total :][:2]
        return bool(first != second) and bool(_one(t) == self.first)

    def _left_from(self, t: Any) -> int:
        """How many of the scheduler's steps there are from where it was told to begin, else from the last timestep that
        the network is told as `t`: Heun's come in pairs, of which the second begins a step."""
        timesteps: Tensor = self.scheduler.timesteps.double()
        begin: int | None = getattr(self.scheduler, "begin_index", None)
        if begin is not None:
            return len(timesteps) - begin
        t = _one(t).to(timesteps)
        away = torch.stack([(timesteps - told).abs() for told in (t, 1000 * t, 1000 * (1 - t))])
        return 1 + int(away.min(0).values.flip(0).argmin())

    def _copies(self, x: Tensor) -> int:
        """How often each sample is among the rows of `x`."""
        if getattr(self.pipe, "do_classifier_free_guidance", None) is False:
            return 1
        able = (copies for copies in COPIES if len(x) % copies == 0)
        return next((n for n in able if all(torch.equal(x.chunk(n)[0], other) for other in x.chunk(n))), 1)

    def _stepped(self) -> None:
        self.done, self.called = self.done + 1, False
        if self.done == self.total:
            self._end()

    def _over(self) -> None:
        self.coming = True
        self._end()

    def _end(self) -> None:
        if not hasattr(self.pipe, ATTACHMENT):
            for part in step_aware_parts(self.network):
                part.end()


def several_calls(pipe: Any) -> TsAdaptError:
    """What a cacher says that takes the calls of a step for one."""
    return TsAdaptError(
        f"the loop of {type(pipe).__name__} calls its network several times a step, which a cacher takes for one; "
        "leave it out"
    )


def _one(t: Any) -> Tensor:
    """The time `()` that a network is told as `t`, one or one for each row."""
    return torch.as_tensor(t).flatten()[0]
