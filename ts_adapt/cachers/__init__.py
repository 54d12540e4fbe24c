"""Cachers: parts of the network's work are done at some steps only, and used again at the others.

with attached(denoiser.network, DeepCache(interval=3)):      or *build("deepcache-3+tgate-5"); of a transformer,
                                                             FirstBlock(threshold=0.1), or *build("firstblock-.1")
    integrate(denoiser, ...)
with attached(pipe, DeepCache(interval=3)):                  a pipeline of diffusers, with any scheduler
    pipe(...)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ts_adapt.cachers.cacher import Cacher
from ts_adapt.cachers.deepcache import DeepCache
from ts_adapt.cachers.loops import heard
from ts_adapt.cachers.of_diffusers import FasterCache, FirstBlock, MagCache, PyramidAttention, SeaCache, TaylorSeer
from ts_adapt.cachers.registry import CACHERS, build
from ts_adapt.cachers.tgate import TGate

__all__ = [
    "CACHERS", "Cacher", "DeepCache", "FasterCache", "FirstBlock", "MagCache", "PyramidAttention", "SeaCache",
    "TGate", "TaylorSeer", "attached", "build",
]  # fmt: skip


@contextmanager
def attached(to: Any, *cachers: Cacher) -> Iterator[nn.Module]:
    """The network `to`, or that of the pipeline `to`, with `cachers` for as long as the block runs.

    Who samples with a network tells them the step: `integrate`, or a pipeline with a schedule attached. A pipeline that
    is given itself does so in any case.
    """
    with ExitStack() as stack:
        network = to if isinstance(to, nn.Module) or not cachers else stack.enter_context(heard(to))
        for cacher in cachers:
            cacher.attach(network)
            stack.callback(cacher.remove, network)
        yield network
