"""DeepCache (Ma, Fang, Wang 2023, arXiv:2312.00858): what the deep layers found changes little from step to step.

Number the skip connections of a UNet from the outside: s_0 leaves conv_in, s_k the k-th unit (resnet with its
attention, or downsampler) of the way down; on the way up the last resnet takes s_0, the one before it s_1, and so on.
With F_b the feature that enters the resnet which takes s_b, b the branch:

    full step    s_0 .. s_K -> middle -> .. -> F_b is kept -> up with s_b .. s_0
    else         s_0 .. s_b            F_b of the last full step -> up with s_b .. s_0

    uniform      every `interval`-th step is full, the first one too
    quadratic    as many full steps, n = ceil(N / interval), closest together at c = center * N:
                 floor(c + sgn(x_k) |x_k|^p), x_k evenly from -c^(1/p) to (N - c)^(1/p), k = 0 .. n - 1;
                 as published, p is lowered until the steps are distinct

Modules that do not run hand on what they are given, so that shapes fit on the way; under T-GATE, which drops the
unconditional half of a guided batch, the conditional half of a kept feature goes on. Gradients flow through what is
kept.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ts_adapt.cachers.cacher import Action, Cacher, whole
from ts_adapt.errors import TsAdaptError, unknown

REFRESH = ("uniform", "quadratic")
BLOCKS = (
    "DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D",
    "UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D",
)  # fmt: skip
"""The blocks whose way from resnet to resnet is known, by the names of their classes."""
RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


class DeepCache(Cacher):
    """Runs the whole network at some steps, and its outermost layers at the others.

    interval  one step in `interval` is full; 1: all of them, and nothing is changed
    branch    b: how many units of the way down run at every step; 0: conv_in only. Published: 0 for Stable Diffusion,
              2 for DDPM on CIFAR
    refresh   "uniform" or "quadratic": where the full steps are
    center    where quadratic refresh is closest, as a share of the steps (published: step 15 of 50)
    power     p of quadratic refresh, above 1 (published: 1.2 to 1.5)

    Raises TsAdaptError for options out of range, and for a branch that the network does not have. A ControlNet or an
    adapter, whose residuals go to the deep layers, is refused when the network is called with them.
    """

    kind = "deepcache"

    def __init__(
        self, interval: int = 3, branch: int = 0, refresh: str = "uniform", center: float = 0.3, power: float = 1.4
    ) -> None:
        if refresh not in REFRESH:
            raise unknown("refresh", str(refresh), REFRESH)
        if not 0 <= center < 1 or not power > 1:
            raise TsAdaptError(f"center is {center} and power {power}; expected 0 <= center < 1 and power > 1")
        self.interval, self.branch = whole("interval", interval, 1), whole("branch", branch, 0)
        self.refresh, self.center, self.power = refresh, center, power
        self._full: frozenset[int] = frozenset()
        self._feature: Tensor | None = None
        self._shallow = False
        super().__init__()

    def full_steps(self, steps: int) -> tuple[int, ...]:
        """The indices of the full steps of a run of `steps`, ascending; 0 is always among them."""
        if self.refresh == "uniform":
            return tuple(range(0, steps, self.interval))
        return quadratic_steps(steps, math.ceil(steps / self.interval), self.center, self.power)

    def begin(self, steps: int, batch: int) -> None:
        super().begin(steps, batch)
        self._full = frozenset(self.full_steps(steps))

    def forget(self) -> None:
        self._feature, self._shallow = None, False

    def actions(self, network: nn.Module) -> list[tuple[nn.Module, Action]]:
        down, up = _blocks(network, "down_blocks"), _blocks(network, "up_blocks")
        count = sum(len(block.resnets) for block in up)
        if self.branch >= count:
            raise TsAdaptError(
                f"branch is {self.branch}, and this {type(network).__name__} has {count} skip connections; expected 0 "
                f"to {count - 1}"
            )
        middle = [block for block in (network.mid_block,) if isinstance(block, nn.Module)]
        return [
            (network, self._call),
            *self._way_down(down),
            *((block, self._pass) for block in middle),
            *self._way_up(up),
        ]

    def _way_down(self, blocks: list[Any]) -> list[tuple[nn.Module, Action]]:
        """The deep blocks of the way down, and the deep units of the block in which the branch ends."""
        found: list[tuple[nn.Module, Action]] = []
        left = self.branch
        for block in blocks:
            units = _units(block)
            if left <= 0:
                found.append((block, self._pass_with_skips(len(units))))
            else:
                found += [(module, self._pass) for unit in units[left:] for module in unit]
            left -= len(units)
        return found

    def _way_up(self, blocks: list[Any]) -> list[tuple[nn.Module, Action]]:
        """The deep blocks of the way up, and the place where F_b enters."""
        found: list[tuple[nn.Module, Action]] = []
        left = self.branch + 1
        for block in reversed(blocks):
            resnets = len(block.resnets)
            if left <= 0:
                found.append((block, self._pass))
            elif left == resnets:
                found.append((block, self._enter))
            elif left < resnets:
                *before, last = (module for unit in _units(block)[: resnets - left] for module in unit)
                found += [(block, self._enter_above), *((module, self._answer) for module in before)]
                found.append((last, self._keep_or_answer))
            left -= resnets
        return found

    def _call(self, forward: Action, *args: Any, **kwargs: Any) -> Any:
        """The network itself: whether this call is shallow is settled here."""
        if any(kwargs.get(name) is not None for name in RESIDUALS):
            raise TsAdaptError(
                "deepcache skips the layers that a ControlNet or an adapter adds to; remove it, or sample without them"
            )
        self._shallow = not self.outside() and self.index not in self._full and self._feature is not None
        return forward(*args, **kwargs)

    def _pass(self, forward: Action, *args: Any, **kwargs: Any) -> Any:
        return _as_asked(_hidden(args, kwargs), kwargs) if self._shallow else forward(*args, **kwargs)

    def _pass_with_skips(self, count: int) -> Action:
        """A block of the way down, which returns `count` skip connections as well."""

        def action(forward: Action, *args: Any, **kwargs: Any) -> Any:
            if not self._shallow:
                return forward(*args, **kwargs)
            hidden = _hidden(args, kwargs)
            return hidden, (hidden,) * count

        return action

    def _answer(self, forward: Action, *args: Any, **kwargs: Any) -> Any:
        return _as_asked(self._kept(_hidden(args, kwargs)), kwargs) if self._shallow else forward(*args, **kwargs)

    def _keep_or_answer(self, forward: Action, *args: Any, **kwargs: Any) -> Any:
        """The last unit before F_b."""
        if self._shallow:
            return _as_asked(self._kept(_hidden(args, kwargs)), kwargs)
        out = forward(*args, **kwargs)
        return _as_asked(self._keep(out[0] if isinstance(out, tuple) else out), kwargs)

    def _enter(self, forward: Action, *args: Any, **kwargs: Any) -> Any:
        """The block whose input is F_b."""
        hidden = _hidden(args, kwargs)
        return _with_hidden(forward, self._kept(hidden) if self._shallow else self._keep(hidden), args, kwargs)

    def _enter_above(self, forward: Action, *args: Any, **kwargs: Any) -> Any:
        """The block inside which F_b is; what it is given, and FreeU writes into, is no skip connection any more."""
        if not self._shallow:
            return forward(*args, **kwargs)
        return _with_hidden(forward, self._kept(_hidden(args, kwargs)), args, kwargs)

    def _keep(self, feature: Tensor) -> Tensor:
        """Keep F_b if the next step needs it. What goes on is a copy, as FreeU writes into it."""
        if self.index is None:
            return feature
        self._feature = None if self.index + 1 in self._full else feature
        return feature.clone() if self._feature is feature else feature

    def _kept(self, hidden: Tensor) -> Tensor:
        """F_b for the rows of `hidden`: all of them, or their conditional half, which comes second."""
        assert self._feature is not None
        return self.for_rows(self._feature, hidden.shape[0]).clone()


def quadratic_steps(steps: int, count: int, center: float, power: float) -> tuple[int, ...]:
    """`count` of `steps` indices, ascending from 0, closest together at `center` * steps; see the module's head."""
    c = center * steps
    while power > 1:
        first, last = -(c ** (1 / power)), (steps - c) ** (1 / power)
        places = [first + (last - first) * k / count for k in range(count)]
        found = sorted({0, *(math.floor(c + math.copysign(abs(x) ** power, x) + 1e-9) for x in places[1:])})
        if len(found) == count:
            return tuple(found)
        power -= 0.02
    return tuple(k * steps // count for k in range(count))


def _blocks(network: nn.Module, name: str) -> list[Any]:
    blocks = list(getattr(network, name))
    foreign = next((block for block in blocks if type(block).__name__ not in BLOCKS), None)
    if foreign is not None:
        raise TsAdaptError(
            f"deepcache does not know its way through a {type(foreign).__name__} among the {name} of this "
            f"{type(network).__name__}; it knows {', '.join(BLOCKS)}"
        )
    return blocks


def _units(block: Any) -> list[list[nn.Module]]:
    """The resnets of `block`, each with its attention, and its downsamplers: one unit for each skip connection."""
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    units = [[m for m in unit if m is not None] for unit in zip(block.resnets, attentions, strict=True)]
    return units + [[sampler] for sampler in getattr(block, "downsamplers", None) or ()]


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _with_hidden(forward: Action, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return forward(hidden, *args[1:], **kwargs)
    return forward(**{**kwargs, "hidden_states": hidden})


def _as_asked(hidden: Tensor, kwargs: dict[str, Any]) -> Any:
    """`hidden` as the module would return it: transformers of diffusers are asked for a tuple."""
    return (hidden,) if kwargs.get("return_dict") is False else hidden
