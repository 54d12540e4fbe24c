"""T-GATE (Zhang et al. 2024, arXiv:2404.02747): text steers the first steps, and the later ones need it no more.

With i the step, m the gate, A(h) the output of an attention layer before its residual:

    i < m     guided as usual; self-attention is computed at the first `warm_up` steps and then every
              `self_attention_interval`-th, in between the last A is used again; if guidance is switched off before the
              gate, that of the conditional half. The authors' package computes it at i = warm_up, where the interval
              divides i, and at i = m - 1, which leaves little to use again in few steps
    i >= m    cross-attention is not computed: A is the mean of what the conditional and the unconditional half gave at
              step m - 1. Guidance is dropped: the conditional half of the batch runs alone, and its output is given
              for both, as r + w (r - r) = r. Self-attention is computed

Without cross-attention it reuses self-attention and drops guidance. A guided batch is one of twice the samples of the
run, the unconditional half first, as Stable Diffusion's pipelines and `Guided` have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.cachers.cacher import Action, Cacher, whole
from ts_adapt.errors import TsAdaptError
from ts_adapt.numerics import each_tensor


class TGate(Cacher):
    """Reuses cross-attention and drops guidance after the gate, reuses self-attention before it.

    gate_step  m: how many steps are guided and attend to the text; None: N // 2.5 of N, which are the published 6 of
               15, 10 of 25, 20 of 50. From N on nothing is gated
    self_attention_interval  before the gate; 1: self-attention is computed at every step (published: 5)
    warm_up    how many steps compute self-attention in any case

    Raises TsAdaptError for options out of range, and for networks without attention or with one that mixes text and
    image.
    """

    kind = "tgate"

    def __init__(self, gate_step: int | None = None, self_attention_interval: int = 1, warm_up: int = 2) -> None:
        self.gate_step = None if gate_step is None else whole("gate_step", gate_step, 1)
        self.self_attention_interval = whole("self_attention_interval", self_attention_interval, 1)
        self.warm_up = whole("warm_up", warm_up, 0)
        self._cross: dict[nn.Module, Tensor] = {}
        self._own: dict[nn.Module, Tensor] = {}
        super().__init__()

    def gate(self, steps: int) -> int:
        """m for a run of `steps`."""
        return max(1, int(steps // 2.5)) if self.gate_step is None else self.gate_step

    def forget(self) -> None:
        self._cross.clear()
        self._own.clear()

    def actions(self, network: nn.Module) -> list[tuple[nn.Module, Action]]:
        from diffusers.models.attention_processor import Attention

        parts: list[Any] = [network.down_blocks, network.mid_block, network.up_blocks]
        attentions = [m for part in parts if part is not None for m in part.modules() if isinstance(m, Attention)]
        if not attentions:
            raise TsAdaptError(
                f"tgate reuses attention, and this {type(network).__name__} has none; use deepcache, or no cacher"
            )
        if any(attention.added_kv_proj_dim is not None for attention in attentions):
            raise TsAdaptError(
                f"the attention of this {type(network).__name__} looks at text and image in one, so that tgate cannot "
                "gate the text alone; use deepcache, or no cacher"
            )
        return [(network, self._call), *((attention, self._attend(attention)) for attention in attentions)]

    def _call(self, forward: Action, *args: Any, **kwargs: Any) -> Any:
        """The network itself: after the gate the conditional half of a guided batch runs alone."""
        if self.outside() or self.index is None:
            return forward(*args, **kwargs)
        rows = (args[0] if args else kwargs["sample"]).shape[0]
        if rows not in (self.batch, 2 * self.batch):
            raise TsAdaptError(
                f"tgate was told of {self.batch} samples and the network is called with {rows}; it knows a batch as it "
                "is and a guided one of twice as many"
            )
        if self.index < self.gate(self.steps) or rows == self.batch:
            return forward(*args, **kwargs)
        return _twice(forward(*_second_half(args, rows), **_second_half(kwargs, rows)))

    def _attend(self, attention: nn.Module) -> Action:
        def action(forward: Action, *args: Any, **kwargs: Any) -> Any:
            text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
            reuse, keep = self._rule(cross=text is not None)
            if not reuse and not keep:
                return forward(*args, **kwargs)
            kept = self._own if text is None else self._cross
            hidden = args[0] if args else kwargs["hidden_states"]
            if reuse and attention in kept:
                kept[attention] = self.for_rows(kept[attention], hidden.shape[0], mean=text is not None)
            else:
                with _without_residual(attention):
                    kept[attention] = forward(*args, **kwargs)
            return _with_residual(attention, kept[attention], hidden)

        return action

    def _rule(self, cross: bool) -> tuple[bool, bool]:
        """Whether an attention layer may use its last output again at this step, and whether to keep what it gives."""
        if self.index is None:
            return False, False
        gate = self.gate(self.steps)
        if cross:
            return self.index >= gate, gate < self.steps
        since = self.index - self.warm_up
        reuse = self.index < gate and since >= 0 and since % self.self_attention_interval != 0
        return reuse, self.index < gate and self.self_attention_interval > 1


@contextmanager
def _without_residual(attention: Any) -> Iterator[None]:
    """While the block runs, `attention` gives A: its residual is not added, nor is the sum scaled."""
    former = attention.residual_connection, attention.rescale_output_factor
    attention.residual_connection, attention.rescale_output_factor = False, 1.0
    try:
        yield
    finally:
        attention.residual_connection, attention.rescale_output_factor = former


def _with_residual(attention: Any, output: Tensor, hidden: Tensor) -> Tensor:
    total = output + hidden if attention.residual_connection else output
    scaled: Tensor = total / attention.rescale_output_factor
    return scaled


def _second_half(value: Any, rows: int) -> Any:
    """The conditional half of all tensors of `rows` rows in `value`."""
    return each_tensor(value, lambda x: x[rows // 2 :] if x.ndim and x.shape[0] == rows else x)


def _twice(out: Any) -> Any:
    """What the network returned for one half, for both."""
    if isinstance(out, tuple):
        return tuple(torch.cat([part, part]) for part in out)
    return type(out)(sample=torch.cat([out.sample, out.sample]))
