"""Classifier-free guidance (Ho & Salimans 2022).

    x0 = x0_none + w (x0_condition - x0_none)

x0 is affine in the network's raw prediction r, with coefficients that both halves share, and the weights w and 1 - w
sum to one: guiding x0 is guiding r, whatever the network predicts, also under `output_scale`. Both halves go through
the network as one batch of 2B, none first, and count as one evaluation; w = 1 needs the conditional half only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ts_adapt.denoisers.wrapped import Wrapped
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Condition, Denoiser
from ts_adapt.numerics import combine


class Guided(Wrapped):
    """A denoiser guided towards its condition.

    denoiser       the denoiser; it must not clip x0 itself, which would not commute with guidance
    scale          w: a number, or `(B,)` for a batch of B; the call's `guidance_scale` overrides it; None: every call
                   has one
    unconditional  the condition that stands for "none", by name: a number (a null class label), or a tensor for one
                   sample `(1, ...)` or for all `(B, ...)` (the embedding of the empty prompt); None: the denoiser's
                   own `null_condition`. What it does not name is shared by both halves.
    clip_x0        clamp the guided x0 to [-1, 1]

    Raises TsAdaptError if no unconditional condition is to be had, or if the denoiser clips.
    """

    clip_x0: bool = False
    guides = True
    loop = None
    """That of the denoiser inside would not be guided."""

    def __init__(
        self,
        denoiser: Denoiser,
        scale: float | Tensor | None,
        unconditional: Condition | None = None,
        *,
        clip_x0: bool = False,
    ) -> None:
        if unconditional is None:
            unconditional = denoiser.null_condition
        if not unconditional:
            raise TsAdaptError(
                "guidance needs the condition that stands for none; pass unconditional={'class_labels': <null class>} "
                "or unconditional={'encoder_hidden_states': <embedding of the empty prompt>}"
            )
        if denoiser.clip_x0:
            raise TsAdaptError("the denoiser clips x0 before guidance; switch its clip_x0 off and Guided's on")
        super().__init__(denoiser)
        self.scale = scale
        self.unconditional = dict(unconditional)
        self.clip_x0 = clip_x0

    @property
    def guidance_scale(self) -> float | None:  # type: ignore[override]
        return None if self.scale is None or isinstance(self.scale, Tensor) else float(self.scale)

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        *,
        model_time: Tensor | None = None,
        output_scale: Tensor | None = None,
        guidance_scale: float | Tensor | None = None,
        guidance_factor: Tensor | None = None,
        **condition: Any,
    ) -> Tensor:
        """The guided x0 `(B, ...)`.

        `guidance_scale`, a number or `(B,)`, takes the place of `scale`; `guidance_factor`, `()` or `(B,)`, multiplies
        either.
        """
        weight = self.scale if guidance_scale is None else guidance_scale
        if weight is None:
            raise TsAdaptError("guidance has a scale for each sample here; give the call guidance_scale, one or `(B,)`")
        if guidance_factor is not None:
            weight = guidance_factor * torch.as_tensor(weight).to(guidance_factor)
        missing = [name for name in self.unconditional if condition.get(name) is None]
        if missing:
            raise TsAdaptError(f"guidance needs the condition {', '.join(missing)} of each sample; the call has none")
        if not isinstance(weight, Tensor) and weight == 1:
            x0 = self.denoiser(x_t, t, model_time=model_time, output_scale=output_scale, **condition)
        else:
            batch = x_t.shape[0]
            both = self.denoiser(
                torch.cat([x_t, x_t]),
                _twice(t),
                model_time=_twice(model_time),
                output_scale=_twice(output_scale),
                **{name: _pair(self.unconditional.get(name), value, batch, name) for name, value in condition.items()},
            )
            none, conditional = both.chunk(2)
            w = torch.as_tensor(weight, dtype=torch.float64)
            x0 = combine((1 - w, none), (w, conditional))
        return x0.clamp(-1, 1) if self.clip_x0 else x0


def _twice(value: Any) -> Any:
    """`(B, ...)` -> `(2B, ...)`; what the batch shares stays."""
    return torch.cat([value, value]) if isinstance(value, Tensor) and value.ndim else value


def _pair(none: Any, value: Any, batch: int, name: str) -> Any:
    """The condition of the doubled batch from `none` (None: as `value`) and `value`; of a dict, part by part."""
    if isinstance(value, Mapping):
        inner = none if isinstance(none, Mapping) else {}
        return {key: _pair(inner.get(key), part, batch, f"{name}.{key}") for key, part in value.items()}
    if not isinstance(value, Tensor):
        return value
    if none is None:
        return _twice(value)
    none = torch.as_tensor(none).to(value)
    if value.ndim and value.shape[0] != batch:
        raise TsAdaptError(f"the condition {name} has {value.shape[0]} rows for a batch of {batch}")
    try:
        return torch.cat([none.expand_as(value), value])
    except RuntimeError as error:
        raise TsAdaptError(
            f"the unconditional {name} of shape {tuple(none.shape)} does not fit the condition's {tuple(value.shape)}"
        ) from error
