"""A calibration set: calls of a network, kept to be run again.

A `Call` is one call as it was made, by `integrate`, by a pipeline, or by hand: `Call.of(network, x_t, timestep,
encoder_hidden_states=...)`. It can be cut to some of its samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.denoisers.network import calling_convention
from ts_adapt.interfaces import TsAdaptError, one_line
from ts_adapt.quantizers.clock import time_argument

SHARED = ("img_ids", "txt_ids")
"""Arguments that all samples have in common, whatever their first size."""


class _Entered(Exception):
    """Leaves a network at its entrance."""


@dataclass(frozen=True)
class Call:
    """args, kwargs  of the network's `forward`
    timestep      `(B,)` float32, what the network is told, in its own unit
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    timestep: Tensor

    @classmethod
    def of(cls, network: nn.Module, x: Tensor, timestep: Tensor, **condition: Any) -> Call:
        """The call of `network` on states `x` `(B, ...)` at `timestep` `()` or `(B,)`, by its calling convention."""
        caught: list[Call] = []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(cls.made(network, args, kwargs))
            raise _Entered

        handle = network.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            times = torch.as_tensor(timestep, dtype=torch.float32).expand(x.shape[0])
            calling_convention(network)(network, x, times, condition)
        except _Entered:
            pass
        finally:
            handle.remove()
        return caught[0]

    @classmethod
    def made(cls, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call of `network` with these arguments."""
        place, name = time_argument(network)
        told = kwargs[name] if name in kwargs else args[place]
        batch = _first(args, kwargs).shape[0]
        timestep = torch.as_tensor(told).detach().float().reshape(-1)
        return cls(args, dict(kwargs), timestep.expand(batch) if timestep.shape[0] == 1 else timestep)

    @property
    def batch(self) -> int:
        return self.timestep.shape[0]

    @property
    def x(self) -> Tensor:
        """The state, or its tokens, `(B, ...)`."""
        return _first(self.args, self.kwargs)

    def rows(self, index: Tensor) -> Call:
        """The call of the samples `index` alone."""
        args = tuple(_cut(value, index, self.batch) for value in self.args)
        kwargs = {k: v if k in SHARED else _cut(v, index, self.batch) for k, v in self.kwargs.items()}
        return Call(args, kwargs, self.timestep[index])

    def run(self, network: nn.Module) -> Tensor:
        """What `network` says to it: the raw prediction `(B, ...)`, or tokens."""
        return prediction_of(network(*self.args, **self.kwargs))


def check_calls(network: nn.Module, calls: Sequence[Call]) -> None:
    """TsAdaptError unless `calls` holds samples, all of one shape, finite, that `network` takes.

    The last is found by running one sample of the first call.
    """
    if sum(call.batch for call in calls) == 0:
        raise TsAdaptError(
            "the calibration set is empty; this quantizer needs samples, collect some along the sampling trajectory"
        )
    shape = calls[0].x.shape[1:]
    for index, call in enumerate(calls):
        if call.x.shape[1:] != shape:
            raise TsAdaptError(
                f"call {index} of the calibration set has samples of shape {tuple(call.x.shape[1:])}, "
                f"the first of {tuple(shape)}; give samples of one shape"
            )
        if not bool(torch.isfinite(call.x).all()):
            raise TsAdaptError(f"call {index} of the calibration set holds a NaN or infinite value; collect it again")
    try:
        with torch.no_grad():
            calls[0].rows(torch.arange(1)).run(network)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise TsAdaptError(
            f"{type(network).__name__} does not take the calibration set's samples of shape {tuple(shape)} "
            f"({one_line(error)}); collect them with this network"
        ) from error


def prediction_of(out: Any) -> Tensor:
    """The raw prediction in what a network returns: a tensor, a tuple that begins with it, or an object with it."""
    out = getattr(out, "sample", out)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1)


def _cut(value: Any, index: Tensor, batch: int) -> Any:
    if isinstance(value, Tensor):
        return value[index] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, Mapping):
        return {key: _cut(part, index, batch) for key, part in value.items()}
    return value
