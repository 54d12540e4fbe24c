"""The caches that diffusers has for transformers, as cachers: told the step, begun anew with each run, taken off again.

    firstblock    r_i = what the first block adds to its input. The other blocks are skipped, and what they added last
                  is added again, while  mean |r_i - r_k| <= threshold * mean |r_k|,  k the last whole step
    magcache      all blocks are skipped, and what they added last is added again, while the sum of |1 - product of
                  ratios| since then stays below the threshold; a ratio is how much longer or shorter what a model's
                  blocks add is than at the step before                                           arXiv:2506.09045
    taylorseer    attention runs every `interval`-th step, and is a Taylor polynomial in the step between  2503.06923
    pab           attention runs every `interval`-th step, and is used again between             2408.12588
    seacache      all blocks are skipped, and what they add is extrapolated, while the summed change of the input, its
                  frequencies weighted by how far they can be seen at this noise, stays below the threshold  2602.18993
    fastercache   attention runs every second time and is extrapolated between; the unconditional half of a guided batch
                  is the conditional one and the last difference of both, low and high frequencies apart  2410.19355

What they do is done by diffusers' own hooks; here they are put in place (`hooks`), and given what they ask for. The
calls of a step are told apart by their order and number of rows, and each has a cache of its own: conditional and
unconditional ones, a pipeline's `cache_context`, and both evaluations of Heun. `pab` and `fastercache` are defined by
timesteps from 1000 to 0, for which the place in the run stands, 1000 (1 - i / N) at step i of N.
"""

from __future__ import annotations

import inspect
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.cachers.cacher import Action, Cacher, whole
from ts_adapt.denoisers.load import quiet
from ts_adapt.denoisers.network import argument_names, step_aware_parts
from ts_adapt.errors import TsAdaptError, one_line
from ts_adapt.numerics import tensors_in

START = 1000.0
"""The timestep that stands for the beginning of a run, to `pab` and `fastercache`."""


class OfDiffusers(Cacher):
    """A cache of diffusers, on one of its transformers. One at a time: they would skip one another's modules."""

    once_a_step = False

    def __init__(self) -> None:
        self._hooks: list[Any] = []
        self._root: Any = None
        self._managers: list[Any] = []
        self._states: dict[str, dict[Any, Any]] = {}
        self._timestep: Any = START
        self._call_of_step = 0
        self._last: int | None = None
        super().__init__()

    @abstractmethod
    def apply(self, network: nn.Module) -> None:
        """Put diffusers' hooks on `network`, or raise ValueError."""

    def refuse(self, network: nn.Module) -> None:
        from diffusers import ModelMixin

        if not isinstance(network, ModelMixin) or not _blocks(network):
            raise TsAdaptError(
                f"{self.kind} works on diffusers' transformers, with their blocks in a list; got "
                f"{type(network).__name__} (deepcache and tgate are for UNets)"
            )
        if getattr(network, "is_cache_enabled", False):
            raise TsAdaptError(
                f"diffusers' enable_cache was called on this {type(network).__name__}, and {self.kind} is one of these "
                "caches; call its disable_cache() first"
            )
        if any(isinstance(part, OfDiffusers) for part in step_aware_parts(network)):
            raise TsAdaptError(
                f"a cache of diffusers is attached to this {type(network).__name__} already, and it takes one, as "
                f"{self.kind} is; remove the other first"
            )

    def actions(self, network: nn.Module) -> list[tuple[nn.Module, Action]]:
        from diffusers.hooks.hooks import StateManager

        from ts_adapt.cachers.hooks import taken

        try:
            with quiet():
                found = taken(network, self.apply)
        except ValueError as error:
            raise TsAdaptError(
                f"{self.kind} does not know the blocks of this {type(network).__name__}: {one_line(error)}"
            ) from error
        self._hooks = [hook for _, hook in found]
        kept = [value for hook in self._hooks for value in vars(hook).values() if isinstance(value, StateManager)]
        self._managers = list({id(manager): manager for manager in kept}.values())
        self._root = next((hook for module, hook in found if module is network), None)
        inner = [(module, partial(self._do, hook, module)) for module, hook in found if module is not network]
        if not inner:
            raise TsAdaptError(
                f"this {type(network).__name__} has none of the layers that {self.kind} works on; take another "
                "cacher, or none"
            )
        return [(network, partial(self._call, network)), *inner]

    def forget(self) -> None:
        for manager in self._managers:
            manager.reset()
        for hook in self._hooks:
            if hasattr(hook, "state"):
                hook.state.reset()
        self._states.clear()
        self._last = None

    def context(self, name: str, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What diffusers' hooks are told of a call, whose cache is called `name`."""
        from diffusers.hooks.hooks import CacheContext

        return CacheContext(name)

    def prepare(self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What else is to be settled before the network is called with the states `x`."""

    def _call(self, network: nn.Module, forward: Action, *args: Any, **kwargs: Any) -> Any:
        """The network itself: which of the caches this call is for is settled here."""
        if self.outside() or self.index is None:
            return forward(*args, **kwargs)
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else (*args, *kwargs.values())[0]
        self._call_of_step = self._call_of_step + 1 if self.index == self._last else 0
        self._last = self.index
        name = f"{self._call_of_step}: {len(x)} rows"
        self._timestep = START * (1 - self.index / self.steps) if name in self._states else START
        states = self._states.setdefault(name, {})
        context = self.context(name, network, args, kwargs)
        for manager in self._managers:
            manager.set_context(context)
        for hook in self._hooks:
            if hasattr(hook, "state"):
                hook.state = states.setdefault(hook, type(hook.state)())
        self.prepare(x, args, kwargs)
        if self._root is None:
            return forward(*args, **kwargs)
        return self._do(self._root, network, forward, *args, **kwargs)

    def _do(self, hook: Any, module: nn.Module, forward: Action, *args: Any, **kwargs: Any) -> Any:
        """What `hook` makes of a call of `module`."""
        if self.index is None:
            return forward(*args, **kwargs)
        hook.fn_ref.original_forward = forward
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        made = hook.new_forward(module, *args, **kwargs) if hasattr(hook, "new_forward") else forward(*args, **kwargs)
        return hook.post_forward(module, made)


class FirstBlock(OfDiffusers):
    """FirstBlockCache: the first block says whether the others run.

    threshold  how far what the first block adds may be from what it added at the last whole step, as a share of that.
               0: nothing is skipped. The mean is over the whole batch: images depend on which were sampled with them

    Published for Flux: .05 to .12 of 28 steps and more; few steps are further apart and want more.
    """

    kind = "firstblock"

    def __init__(self, threshold: float = 0.05) -> None:
        self.threshold = _threshold(threshold)
        super().__init__()

    def apply(self, network: nn.Module) -> None:
        from diffusers.hooks.first_block_cache import FirstBlockCacheConfig, apply_first_block_cache

        _refuse_blocks(self.kind, network, alike=True)
        apply_first_block_cache(network, FirstBlockCacheConfig(self.threshold))

    def _do(self, hook: Any, module: nn.Module, forward: Action, *args: Any, **kwargs: Any) -> Any:
        """The last block of SD3 returns no text, of which the hook wants a difference: it is given what came in."""

        def whole_output(*args: Any, **kwargs: Any) -> Any:
            made = forward(*args, **kwargs)
            if not isinstance(made, tuple) or all(part is not None for part in made):
                return made
            given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
            return tuple(given["encoder_hidden_states"] if part is None else part for part in made)

        return super()._do(hook, module, whole_output, *args, **kwargs)


class MagCache(OfDiffusers):
    """MagCache: what all blocks add is used again as long as its length hardly changes, by ratios known beforehand.

    threshold  of the summed error
    max_skip   how many steps in a row may be skipped; 0: none
    ratios     of the lengths, one a step (of other numbers of steps the nearest); None: those published for Flux
    measure    skip nothing, and have the `ratios` of the first call of each step after a run

    The first fifth of the steps always runs. A network other than Flux needs ratios of its own.
    """

    kind = "magcache"

    def __init__(
        self, threshold: float = 0.06, max_skip: int = 3, ratios: Sequence[float] | None = None, measure: bool = False
    ) -> None:
        self.threshold, self.max_skip, self.measure = _threshold(threshold), whole("max_skip", max_skip, 0), measure
        self.ratios = None if ratios is None else [float(ratio) for ratio in ratios]
        if self.ratios is not None and not (self.ratios and all(ratio > 0 for ratio in self.ratios)):
            raise TsAdaptError(f"ratios are {self.ratios}; expected a positive number for each step of a run")
        self._config: Any = None
        super().__init__()

    def apply(self, network: nn.Module) -> None:
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, MagCacheConfig, apply_mag_cache

        _refuse_blocks(self.kind, network)
        if self.ratios is None and not self.measure:
            if type(network).__name__ != "FluxTransformer2DModel":
                raise TsAdaptError(
                    f"magcache goes by ratios of the model, which are published for Flux and not for this "
                    f"{type(network).__name__}; measure them in a run with MagCache(measure=True), whose `ratios` "
                    "MagCache takes"
                )
            self.ratios = FLUX_MAG_RATIOS.tolist()
        self._config = MagCacheConfig(
            self.threshold, self.max_skip, mag_ratios=self.ratios, calibrate=self.measure,
            num_inference_steps=len(self.ratios or []),
        )  # fmt: skip
        apply_mag_cache(network, self._config)

    def begin(self, steps: int, batch: int) -> None:
        from diffusers.hooks.mag_cache import nearest_interp

        super().begin(steps, batch)
        self._config.num_inference_steps = steps + self.measure  # the hook prints what it has measured at the last one
        if not self.measure:
            self._config.mag_ratios = nearest_interp(torch.tensor(self.ratios), steps)

    def end(self) -> None:
        states = [state for manager in self._managers for state in manager._state_cache.values()]
        if self.measure and states:
            self.ratios = list(states[0].calibration_ratios)
        super().end()


class SeaCache(OfDiffusers):
    """SeaCache: what all blocks add is extrapolated from the last two whole steps while the input hardly changes.

    threshold  of the summed change, 0: nothing is skipped. The mean is over the whole batch, as with `FirstBlock`

    For Wan's networks from text alone, which are those that diffusers has it for and that take samples by the batch;
    their timestep is 1000 times sigma. The first and the last step run, and at most two in a row do not. It keeps what
    it keeps without gradients.
    """

    kind = "seacache"

    def __init__(self, threshold: float = 0.25) -> None:
        self.threshold = _threshold(threshold)
        super().__init__()

    def apply(self, network: nn.Module) -> None:
        from diffusers.hooks.sea_cache import SeaCacheConfig, apply_sea_cache

        config: Any = network.config
        if type(network).__name__ != "WanTransformer3DModel" or config.in_channels != config.out_channels:
            raise TsAdaptError(
                f"seacache works on Wan's networks from text alone; got {type(network).__name__}: take firstblock, or "
                "no cacher"
            )
        apply_sea_cache(network, SeaCacheConfig(self.threshold))

    def context(self, name: str, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.is_grad_enabled():
            raise TsAdaptError(
                "seacache keeps no gradients; sample under torch.no_grad(), search without a gradient (--static.method "
                "forward), or take another cacher"
            )
        given = {**dict(zip(argument_names(network), args, strict=False)), **kwargs}
        sigma = float(torch.as_tensor(given["timestep"]).double().mean()) / 1000
        return replace(
            super().context(name, network, args, kwargs), step_index=self.index, num_inference_steps=self.steps,
            sigma=sigma,
        )  # fmt: skip


class TaylorSeer(OfDiffusers):
    """TaylorSeer: attention is extrapolated between the steps at which it runs.

    interval  one step in `interval` runs behind the first ones; 1: every step, and nothing is changed
    order     of the polynomial
    warm_up   how many of the first steps run, at least 1
    """

    kind = "taylorseer"

    def __init__(self, interval: int = 5, order: int = 1, warm_up: int = 3) -> None:
        self.interval, self.order = whole("interval", interval, 1), whole("order", order, 0)
        self.warm_up = whole("warm_up", warm_up, 1)
        super().__init__()

    def apply(self, network: nn.Module) -> None:
        from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig, apply_taylorseer_cache

        names = [re.escape(name) for name in _attentions(network)]
        if names:
            config = TaylorSeerCacheConfig(
                self.interval, self.warm_up, max_order=self.order, cache_identifiers=names,
                taylor_factors_dtype=network.dtype,
            )  # fmt: skip
            apply_taylorseer_cache(network, config)


class PyramidAttention(OfDiffusers):
    """Pyramid attention broadcast: attention is used again, in the middle of a run (its places 800 to 100 of 1000).

    interval  of self-attention; 1: it runs at every step
    cross     of cross-attention; None: it is left alone, as is attention over time
    temporal  of attention over time
    """

    kind = "pab"

    def __init__(self, interval: int = 2, cross: int | None = None, temporal: int | None = None) -> None:
        self.interval = whole("interval", interval, 1)
        self.cross = None if cross is None else whole("cross", cross, 1)
        self.temporal = None if temporal is None else whole("temporal", temporal, 1)
        super().__init__()

    def apply(self, network: nn.Module) -> None:
        from diffusers.hooks.pyramid_attention_broadcast import (
            PyramidAttentionBroadcastConfig,
            apply_pyramid_attention_broadcast,
        )

        config = PyramidAttentionBroadcastConfig(
            self.interval, self.temporal, self.cross, current_timestep_callback=lambda: self._timestep
        )
        apply_pyramid_attention_broadcast(network, config)


class FasterCache(OfDiffusers):
    """FasterCache: attention is extrapolated, and the unconditional half of a guided batch estimated, in the second
    half of a run (places below 681 and 641 of 1000).

    interval       of attention, which is extrapolated at steps where the unconditional half is estimated, or without
                   guidance; 1: it runs at every step
    unconditional  one step in so many runs the unconditional half; 1: every one

    A guided batch is one of twice the samples of the run, the unconditional half first. The estimate has no gradient.
    """

    kind = "fastercache"

    def __init__(self, interval: int = 2, unconditional: int = 5) -> None:
        self.interval = whole("interval", interval, 1)
        self.unconditional = whole("unconditional", unconditional, 1)
        super().__init__()

    def apply(self, network: nn.Module) -> None:
        from diffusers.hooks.faster_cache import FasterCacheConfig, apply_faster_cache

        if "class_labels" in argument_names(network):
            raise TsAdaptError(
                "fastercache takes the second half of a guided batch for the conditional one, and the pipeline of "
                f"{type(network).__name__} gives it first; take another cacher"
            )
        config = FasterCacheConfig(
            self.interval, unconditional_batch_skip_range=self.unconditional, tensor_format="BCHW",
            attention_weight_callback=lambda _: 0.5, current_timestep_callback=lambda: self._timestep,
        )  # fmt: skip
        apply_faster_cache(network, config)

    def prepare(self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        guided = len(x) == 2 * self.batch
        if guided and x.ndim < 4:
            raise TsAdaptError(
                "fastercache splits images into frequencies, and this network is given tokens of a guided batch; "
                "guide in two calls, or take another cacher"
            )
        if guided and torch.is_grad_enabled() and x.requires_grad:
            raise TsAdaptError(
                "fastercache estimates the unconditional half without a gradient; search without one (--static.method "
                "forward), or take another cacher"
            )
        inside = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
        if guided and any(part.ndim and len(part) == len(x) for part in tensors_in(inside)):
            raise TsAdaptError(
                "fastercache halves a guided batch, and not what a ControlNet or the like adds to it; remove that, or "
                "take another cacher"
            )
        for hook in self._hooks:
            hook.is_guidance_distilled = not guided
        self._root.uncond_cond_input_kwargs_identifiers = [
            name for name, value in kwargs.items() if isinstance(value, Tensor) and value.ndim and len(value) == len(x)
        ]


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer, in their order, as diffusers' hooks find them."""
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS as NAMES

    lists = [part for name, part in network.named_children() if name in NAMES and isinstance(part, nn.ModuleList)]
    return [block for part in lists for block in part]


def _refuse_blocks(kind: str, network: nn.Module, alike: bool = False) -> None:
    """TsAdaptError for a network whose blocks cannot be skipped: a single one, or if all are to be `alike`, some that
    return the text beside the image and some that do not."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    blocks = _blocks(network)
    if len(blocks) < 2:
        raise TsAdaptError(f"{kind} skips the blocks behind the first, and this {type(network).__name__} has one")
    if hasattr(network, "temporal_transformer_blocks"):
        raise TsAdaptError(
            f"{kind} skips blocks that follow one another, and those of {type(network).__name__} go over space and "
            "over time by turns; take another cacher"
        )
    texts = set()
    for block in blocks:
        known = TransformerBlockRegistry.get(type(block))
        texts.add(known.return_encoder_hidden_states_index is not None)
        names = {"hidden_states" if alike else known.hidden_states_argument_name}
        names |= {"encoder_hidden_states"} if known.return_encoder_hidden_states_index is not None else set()
        if not names <= {*argument_names(block)}:
            raise ValueError(f"{type(block).__name__} is not called with {' and '.join(sorted(names))}")
    if alike and len(texts) > 1:
        raise TsAdaptError(
            f"{kind} compares what the first and the last block return, and those of this {type(network).__name__} "
            "return different things; take another cacher"
        )


def _attentions(network: nn.Module) -> list[str]:
    """The names of the attention layers in the blocks of `network`."""
    from diffusers.hooks._common import _ATTENTION_CLASSES

    inside = {id(module) for block in _blocks(network) for module in block.modules()}
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, _ATTENTION_CLASSES) and id(module) in inside
    ]


def _threshold(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise TsAdaptError(f"threshold is {value!r}; expected a number of at least 0")
    return float(value)
