"""Cachers: parts of the network's work are done at some steps only, and used again at the others.

with attached(denoiser.network, DeepCache(interval=3)):      or *named("deepcache-3+tgate-5")
    integrate(denoiser, ...)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from ts_adapt.cachers.cacher import Cacher
from ts_adapt.cachers.deepcache import DeepCache
from ts_adapt.cachers.registry import CACHERS, named
from ts_adapt.cachers.tgate import TGate

__all__ = ["CACHERS", "Cacher", "DeepCache", "TGate", "attached", "named"]


@contextmanager
def attached(network: nn.Module, *cachers: Cacher) -> Iterator[nn.Module]:
    """`network` with `cachers` for as long as the block runs."""
    with ExitStack() as stack:
        for cacher in cachers:
            cacher.attach(network)
            stack.callback(cacher.remove, network)
        yield network
