"""What the layers of a network receive on a calibration set.

`observe` runs a calibration set and shows a visitor the input of each layer, `observe_attention` what flows within the
attentions. Of what they show is kept, by layer,

    InputRecord      its range by timestep, and some of its values: their ranks are cut into strata, which grow
                     geometrically from both ends; the middle value of each is kept, and how many it stands for. So
                     extremes are kept one by one, and count as one.
    second moments   G = E x^T x, of which the error of the output follows, for methods that look at it:
                     E ||x (W - W^)^T||^2 = tr(D G D^T),  D = W - W^

W is the layer's weight as a matrix `(O, K)`; x are the rows that it multiplies: tokens of a Linear, the unfolded
patches of a Conv2d, K = I h w, of one group of channels each. Means in float64, so that no order of batches matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.layers.affine import channel_dim
from ts_adapt.quantizers.layers.attention import TENSORS, TakenOver
from ts_adapt.quantizers.layers.quantized_layer import Layer
from ts_adapt.quantizers.layers.timestep import TimestepListener

Visit = Callable[[str, Tensor, Tensor], None]
"""(layer's name, its input, the timestep `(B,)` of its call)."""


def observe(network: nn.Module, names: Iterable[str], calls: Sequence[Call], visit: Visit) -> None:
    """Run `calls` and show `visit` the input of every layer of `names`, each time that it is called."""
    now: list[Tensor] = []

    def listener(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: visit(name, args[0].detach(), now[0])

    handles = [network.get_submodule(name).register_forward_pre_hook(listener(name)) for name in names]
    try:
        with torch.no_grad():
            for call in calls:
                now[:] = [call.timestep]
                call.run(network)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def observe_attention(
    network: nn.Module, names: Sequence[str], listener: TimestepListener, visit: Visit
) -> Iterator[None]:
    """While the block runs, `visit` is shown `NAME.query`, ... of the attentions `names`."""

    def shown(name: str) -> Callable[[Tensor], Tensor]:
        def through(x: Tensor) -> Tensor:
            visit(name, x.detach(), listener.now(x.shape[0]))
            return x

        return through

    def listening(name: str) -> Callable[..., Any]:
        through = {tensor: shown(f"{name}.{tensor}") for tensor in TENSORS}
        former = network.get_submodule(name).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with TakenOver(through):
                return former(*args, **kwargs)

        return forward

    with ExitStack() as stack:
        for name in names:
            module = network.get_submodule(name)
            module.__dict__["forward"] = listening(name)
            stack.callback(module.__dict__.pop, "forward")
        yield


def rows_by_time(x: Tensor, timestep: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Each timestep in `timestep` `(B,)`, and which rows of `x` `(n, ...)` are of it; n a multiple of B."""
    for time in timestep.unique().tolist():
        yield time, (timestep == time).repeat_interleave(x.shape[0] // timestep.shape[0])


@dataclass
class InputRecord:
    """What a layer receives, by timestep, in rising order. T timesteps, C input channels.

    times            `(T,)`
    low, high        `(T,)` the smallest and the largest value
    channel_bound    `(T, C)` the largest absolute value of each input channel
    values, weights  T tensors each: some of the values, the smallest and the largest among them, and how many of all
                     each stands for
    """

    times: Tensor
    low: Tensor
    high: Tensor
    channel_bound: Tensor
    values: list[Tensor]
    weights: list[Tensor]

    @property
    def all_values(self) -> Tensor:
        return torch.cat(self.values)

    @property
    def all_weights(self) -> Tensor:
        return torch.cat(self.weights)

    def rows(self, most: int) -> tuple[Tensor, Tensor]:
        """At most `most` values of each timestep, and their weights: both `(T, n)`; what fills a row up weighs 0."""
        kept = [condensed(*of_time, most) for of_time in zip(self.values, self.weights, strict=True)]
        n = max(len(values) for values, _ in kept)
        return (
            torch.stack([torch.cat([values, values[-1:].expand(n - len(values))]) for values, _ in kept]),
            torch.stack([nn.functional.pad(weights, (0, n - len(weights))) for _, weights in kept]),
        )


def strata(count: int, most: int) -> Tensor:
    """Where `count` ranks are cut into at most `most` strata: `(n + 1,)`, from 0 to `count`. Half of the cuts are even,
    the others geometric from both ends."""
    if count <= most:
        return torch.arange(count + 1)
    near = torch.logspace(0, math.log10(count / 2), most // 4, dtype=torch.float64)
    even = torch.linspace(0, count, most // 2 + 1, dtype=torch.float64)
    edges: Tensor = torch.cat([near, count - near, even, even.new_tensor([count])]).round().long().unique()
    return edges


def condensed(values: Tensor, weights: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """At most `most` of the `values` `(n,)`, in rising order, with the `weights` of all that each stands for."""
    values, order = values.sort()
    edges = strata(len(values), most).to(values.device)
    mass = nn.functional.pad(weights[order].double().cumsum(0), (1, 0))
    return values[(edges[:-1] + edges[1:] - 1) // 2], mass[edges].diff().float()


class Recorder:
    """Gathers `InputRecord`s: `visit` is shown tensors `(n, ...)` by name, with the timesteps `(B,)` of their call; at
    most `keep` values of a name at a timestep in a call are kept."""

    def __init__(self, keep: int = 2048) -> None:
        self.keep = keep
        self.seen: dict[str, dict[float, list[tuple[Tensor, Tensor, Tensor]]]] = {}

    def visit(self, name: str, x: Tensor, timestep: Tensor) -> None:
        for time, own in rows_by_time(x, timestep):
            rows = x[own].float()
            bound = rows.abs().movedim(channel_dim(rows), 0).flatten(1).amax(1)
            stats = torch.cat([rows.amin()[None], rows.amax()[None], bound])
            values, weights = condensed(rows.flatten(), torch.ones_like(rows).flatten(), self.keep)
            self.seen.setdefault(name, {}).setdefault(time, []).append((stats.cpu(), values.cpu(), weights.cpu()))

    def records(self, names: Iterable[str]) -> dict[str, InputRecord]:
        """The records of `names`; TsAdaptError, naming them, if some were never seen."""
        names = list(names)
        unreached = [name for name in names if name not in self.seen]
        if unreached:
            raise TsAdaptError(
                f"the calibration set does not reach {', '.join(sorted(unreached))}; add samples, or skip"
            )
        return {name: _record(self.seen[name]) for name in names}


def record_inputs(network: nn.Module, names: Iterable[str], calls: Sequence[Call]) -> dict[str, InputRecord]:
    """The record of each layer of `names` on `calls`; TsAdaptError, naming them, if some are not reached."""
    names, recorder = list(names), Recorder()
    observe(network, names, calls, recorder.visit)
    return recorder.records(names)


def _record(by_time: dict[float, list[tuple[Tensor, Tensor, Tensor]]]) -> InputRecord:
    times = sorted(by_time)
    stats = [torch.stack([of_call for of_call, _, _ in by_time[time]]) for time in times]
    return InputRecord(
        times=torch.tensor(times),
        low=torch.stack([row[:, 0].amin() for row in stats]),
        high=torch.stack([row[:, 1].amax() for row in stats]),
        channel_bound=torch.stack([row[:, 2:].amax(0) for row in stats]),
        values=[torch.cat([values for _, values, _ in by_time[time]]) for time in times],
        weights=[torch.cat([weights for _, _, weights in by_time[time]]) for time in times],
    )


def second_moments(network: nn.Module, layers: dict[str, Layer], calls: Sequence[Call]) -> dict[str, Tensor]:
    """G of each of `layers`, by name: `(groups, K, K)` float64; layers that no call reaches are left out.

    The inputs are those that arrive in `network` as it is; `layers` say how they are unfolded.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def visit(name: str, x: Tensor, timestep: Tensor) -> None:
        matrix = input_rows(layers[name], x).double()
        sums[name] = sums.get(name, torch.zeros(())).to(matrix) + matrix.transpose(1, 2) @ matrix
        rows[name] = rows.get(name, 0) + matrix.shape[1]

    observe(network, layers, calls, visit)
    return {name: total / rows[name] for name, total in sums.items()}


def input_rows(layer: Layer, x: Tensor) -> Tensor:
    """The rows that the weight of `layer` multiplies, `(groups, n, K)`."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, list(layer._reversed_padding_repeated_twice), mode=mode)
    patches = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    split = patches.view(x.shape[0], layer.groups, -1, patches.shape[-1])
    return split.permute(1, 0, 3, 2).flatten(1, 2)


def output_error(difference: Tensor, moment: Tensor) -> Tensor:
    """tr(D G D^T) / O: the mean squared error of an output, for D of the shape of the layer's weight."""
    rows = difference.flatten(1).to(moment.dtype).view(moment.shape[0], -1, moment.shape[-1])
    return ((rows @ moment) * rows).sum() / difference.shape[0]
