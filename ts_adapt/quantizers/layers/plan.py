"""Which layers of a network are quantized, which stay in full precision, and why.

Quantized are the modules that are exactly `nn.Linear` or `nn.Conv2d`: subclasses may be run by their parent's own code.
In full precision stay

    the first layer       it sees the state itself, whose range carries the image; few weights
    the last layer        its error goes into the state without another layer to absorb it; few weights
    the time embedding    its error is common to all of the network; also the embeddings of class and pooled text
    what cannot be        a matrix of another kind of module, a weight with a NaN; named, counted, left alone

The names are those of diffusers' networks (UNet2DModel, UNet2DConditionModel, DiT, PixArt, SD3, Flux); of a network
that has none of them, the first and the last layer in the order of registration. The projections of the time embedding
inside the blocks are quantized, as in Q-Diffusion and TDQ.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ts_adapt.denoisers.execution import execution_of
from ts_adapt.errors import TsAdaptError

FIRST = re.compile(r"(conv_in|patch_embed\.proj|pos_embed\.proj|x_embedder|context_embedder|caption_projection)(\..*)?")
LAST = re.compile(r"(conv_out|proj_out(_[12])?|norm_out\.linear)")
TIME = re.compile(
    r"(.*\.)?(time_proj|time_embedding|time_embed|time_text_embed|class_embedding|add_embedding|adaln_single"
    r"|timestep_embedder|guidance_embedder|text_embedder|class_embedder)(\..*)?"
)
RESNET = re.compile(r"mid_block\.resnets\.\d+|up_blocks\.\d+\.resnets\.\d+")
FIRST_REASON, LAST_REASON, TIME_REASON = "first layer", "last layer", "time embedding"


@dataclass
class LayerOptions:
    """Which layers are quantized, and what is done around them."""

    keep_ends: bool = True
    """The first and the last layer stay in full precision."""
    keep_time_embedding: bool = True
    """So do the embeddings of time, class and pooled text."""
    skip: tuple[str, ...] = ()
    """And layers whose names match one of these patterns, as `mid_block.*` or `*.to_out.0`."""
    split_shortcuts: bool = False
    """The shortcuts of a U-Net's decoder are quantized as two layers: for what comes from below, and for the skip
    connection concatenated to it, whose range is another (Q-Diffusion)."""
    correct: bool = False
    """What the quantized network says is corrected (PTQD, `correction`)."""


@dataclass(frozen=True)
class PlannedLayer:
    """name    in the network
    kind    the class of the module: Linear, Conv2d, or what cannot be quantized
    shape   of the weight
    reason  why it stays in full precision; None: it is quantized
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: str | None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


def plan(network: nn.Module, options: LayerOptions | None = None) -> list[PlannedLayer]:
    """Every module of `network` with a weight matrix, in order of registration, and what becomes of it.

    Raises TsAdaptError when a pattern of `options.skip` matches no layer, when nothing is left to quantize, and for
    fused projections (`denoisers.execution`).
    """
    options = options or LayerOptions()
    if execution_of(network).fused:
        raise TsAdaptError(
            f"the projections of this {type(network).__name__} are fused, of weights in full precision; leave "
            "model.fused_qkv out, or the quantizer"
        )
    candidates = {name: module for name, module in network.named_modules() if _has_matrix(module)}
    for pattern in options.skip:
        if not any(fnmatchcase(name, pattern) for name in candidates):
            raise TsAdaptError(f"no layer of {type(network).__name__} has a name like {pattern!r}; take it out of skip")
    ends = _ends(candidates) if options.keep_ends else {}
    planned = [
        PlannedLayer(name, type(module).__name__, tuple(module.weight.shape), _reason(name, module, ends, options))
        for name, module in candidates.items()
    ]
    if all(layer.reason is not None for layer in planned):
        raise TsAdaptError(
            f"{type(network).__name__} has no layer to quantize: {summary(planned)}; give a network with Linear or "
            "Conv2d layers, or keep fewer of them in full precision"
        )
    return planned


def split_points(network: nn.Module, planned: Iterable[PlannedLayer]) -> dict[str, int]:
    """The shortcuts of the decoder that are to be quantized, by name, and how many of their channels come from below.

    Those are the channels of the resnet before; the others are the skip connection's. Raises TsAdaptError for a network
    without any.
    """
    below, points = 0, {}
    quantized = {layer.name: layer for layer in planned if layer.reason is None}
    for name in sorted(filter(RESNET.fullmatch, dict(network.named_modules()))):
        shortcut = quantized.get(f"{name}.conv_shortcut")
        if name.startswith("up_blocks") and shortcut is not None and 0 < below < shortcut.shape[1]:
            points[shortcut.name] = below
        below = int(network.get_submodule(name).out_channels)  # type: ignore[arg-type]
    if not points:
        raise TsAdaptError(
            f"{type(network).__name__} has no decoder with shortcuts over concatenated skip connections; leave "
            "split_shortcuts out"
        )
    return points


def summary(planned: Iterable[PlannedLayer]) -> str:
    """Counts in words: "38 quantized (1,204,512 weights); kept: 2 time embedding, 1 first layer, 1 last layer"."""
    planned = list(planned)
    quantized = [layer for layer in planned if layer.reason is None]
    kept = Counter(layer.reason for layer in planned if layer.reason is not None)
    text = f"{len(quantized)} quantized ({sum(layer.numel for layer in quantized):,} weights)"
    return text + ("; kept: " + ", ".join(f"{n} {reason}" for reason, n in kept.most_common()) if kept else "")


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim >= 2


def _ends(candidates: dict[str, nn.Module]) -> dict[str, str]:
    """The names of the first and last layers with their reasons."""
    ends = {name: FIRST_REASON for name in candidates if FIRST.fullmatch(name)}
    ends |= {name: LAST_REASON for name in candidates if LAST.fullmatch(name)}
    layers = [name for name, module in candidates.items() if type(module) in (nn.Linear, nn.Conv2d)]
    if not ends and layers:
        ends = {layers[-1]: LAST_REASON, layers[0]: FIRST_REASON}
    return ends


def _reason(name: str, module: nn.Module, ends: dict[str, str], options: LayerOptions) -> str | None:
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"{type(module).__name__}, which cannot be quantized"
    if not bool(torch.isfinite(module.weight).all()):  # type: ignore[arg-type]
        return "weight with a NaN or infinite value, which cannot be quantized"
    if name in ends:
        return ends[name]
    if options.keep_time_embedding and TIME.fullmatch(name):
        return TIME_REASON
    return "skipped by name" if any(fnmatchcase(name, pattern) for pattern in options.skip) else None
