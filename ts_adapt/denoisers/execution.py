"""How a network is run, beside what it computes: memory layout, fused projections, compilation.

    channels_last   weights, and with them the features of convolutions, have the channels innermost in memory
    fused_qkv       one matrix product for Q, K and V of self-attention, and one for K and V of cross-attention:
                    [Q K V] = x [W_Q W_K W_V]
    compile         torch.compile, by one of its backends, in place

What the network says stays the same up to rounding, and its `state_dict` altogether.
Attention itself is torch's scaled_dot_product_attention with any of them and with none: diffusers' default.

Fused projections are made of the weights that are there, so that a quantizer refuses them; a compiled network is run as
one piece, so that a cacher refuses it. Layers and hooks that come and go, as a quantizer's do, a compiled network
notices, and is compiled again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ts_adapt.errors import TsAdaptError, unknown

ATTRIBUTE = "_ts_adapt_execution"
RECOMPILATIONS = 64
"""How often one network may be compiled anew before torch runs it uncompiled; torch's own limit is 8."""


@dataclass(frozen=True)
class Execution:
    """How a network is run at present."""

    channels_last: bool = False
    compile: str | None = None
    fused: bool = False


def execute(
    network: nn.Module, *, channels_last: bool = False, fused_qkv: bool = False, compile: str | None = None
) -> nn.Module:
    """Have `network` run in the ways of the module's head, and return it; `compile` names a backend: inductor, ...

    Raises TsAdaptError, and leaves the network as it was, for attention that cannot be fused, for none at all, for an
    unknown backend, and for a network that is run in some such way already.
    """
    if execution_of(network) != Execution():
        raise TsAdaptError(f"this {type(network).__name__} is run in a way of its own already; load another")
    if compile is not None:
        backends = torch.compiler.list_backends(exclude_tags=())
        if compile not in backends:
            raise unknown("backend of torch.compile", compile, sorted(backends))
    if fused_qkv:
        _fuse(network)
    if channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compile is not None:
        dynamo: Any = torch._dynamo.config
        dynamo.skip_nnmodule_hook_guards = False
        dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILATIONS)
        network.compile(backend=compile)
    setattr(network, ATTRIBUTE, Execution(channels_last, compile, fused_qkv))
    return network


def execution_of(network: nn.Module) -> Execution:
    """How `network` is run."""
    found: Execution = network.__dict__.get(ATTRIBUTE, Execution())
    return found


def _fuse(network: nn.Module) -> None:
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0

    name = type(network).__name__
    attentions: list[Any] = [module for module in network.modules() if isinstance(module, Attention)]
    if not attentions:
        raise TsAdaptError(f"this {name} has no attention of diffusers' making to fuse; leave fused_qkv out")
    foreign = next((a.processor for a in attentions if type(a.processor) is not AttnProcessor2_0), None)
    if foreign is not None:
        raise TsAdaptError(
            f"the attention of this {name} is run by {type(foreign).__name__}, whose projections are not fused here; "
            "leave fused_qkv out"
        )
    for attention in attentions:
        attention.fuse_projections()
        getattr(attention, _projection(attention)).requires_grad_(attention.to_k.weight.requires_grad)
        attention.set_processor(FusedAttnProcessor2_0())
        attention.register_state_dict_post_hook(_without_fused)


def _projection(attention: Any) -> str:
    """The name of the fused projection."""
    return "to_kv" if attention.is_cross_attention else "to_qkv"


def _without_fused(attention: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave out of `state` what repeats the weights of others."""
    for key in [key for key in state if key.startswith(f"{prefix}{_projection(attention)}.")]:
        del state[key]


def uncompiled() -> AbstractContextManager[Any]:
    """Within the block compiled networks run as they are written: what is inside a compiled one is not seen."""
    stance: Any = torch.compiler.set_stance
    return stance("force_eager")  # type: ignore[no-any-return]
