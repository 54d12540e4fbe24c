"""The timestep that a network is being told, for the quantizers inside it.

A `TimestepListener` listens at the network's entrance, so whoever calls the network tells it: `integrate`, a pipeline
of diffusers, a training loop, a recomputation under gradient checkpointing. Grids of their own for every sample, Heun's
second evaluation and guidance's doubled batch need no word from the sampler; step counts (`StepAware`) would not tell
the time of any of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.errors import TsAdaptError


class TimestepListener:
    """Holds the timestep `(B,)` of the network's current (or latest) call, in the network's own unit.

    `stop()` takes the listener off the network.
    """

    def __init__(self, network: nn.Module) -> None:
        self._told = timestep_argument(network)
        self.timestep: Tensor | None = None
        self.handle = network.register_forward_pre_hook(self._hear, with_kwargs=True)

    def _hear(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.timestep = self._told(args, kwargs)

    def now(self, batch: int) -> Tensor:
        """The timestep of every row of a batch inside the network, `(batch,)` float32.

        A batch that is a multiple of the network's (heads or windows folded into it) repeats each time. Of half the
        network's rows it is the second half, the conditional one, with which T-GATE goes on alone. Raises TsAdaptError
        before the first call, or for any other batch.
        """
        if self.timestep is None:
            raise TsAdaptError("a time-dependent quantizer was run by itself; call the network that it is in")
        times = self.timestep.float()
        if times.shape[0] == 2 * batch:
            times = times[batch:]
        if batch % times.shape[0]:
            raise TsAdaptError(f"{times.shape[0]} timesteps were given for a batch of {batch}; give one, or {batch}")
        return times.repeat_interleave(batch // times.shape[0])

    def stop(self) -> None:
        self.handle.remove()


def between(times: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """What `values` `(T, ...)`, known at the rising `times` `(T,)`, are at `at` `(n,)`: `(n, ...)`, linear between two
    of them, constant beyond."""
    after = torch.searchsorted(times, at.float().contiguous()).clamp(max=len(times) - 1)
    before = (after - 1).clamp(min=0)
    width = (times[after] - times[before]).clamp(min=1e-12)
    share = ((times[after] - at) / width).clamp(0, 1).view(-1, *[1] * (values.ndim - 1))
    return values[after] + share * (values[before] - values[after])


def timestep_argument(network: nn.Module) -> Callable[[tuple[Any, ...], Mapping[str, Any]], Tensor]:
    """(args, kwargs) of a call of `network` -> the timestep in it, `(1,)` or `(B,)`.

    That is the argument `timestep`, else the second. Raises TsAdaptError for a network with one argument alone.
    """
    names = list(inspect.signature(network.forward).parameters)
    if "timestep" not in names and len(names) < 2:
        raise TsAdaptError(f"{type(network).__name__} takes no timestep; expected a network called with (x, timestep)")
    place = names.index("timestep") if "timestep" in names else 1

    def told(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        timestep = kwargs[names[place]] if names[place] in kwargs else args[place]
        return torch.as_tensor(timestep).detach().reshape(-1)

    return told
