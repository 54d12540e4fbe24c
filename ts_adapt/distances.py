"""Per-sample distances between images in [-1, 1]: what a schedule is trained to make small.

    l2        mean_i (x_i - y_i)^2                                over all entries i of a sample
    l1        mean_i |x_i - y_i|
    features  mean_k mean_p |u_k(x)_p - u_k(y)_p|^2               u = h / |h|, h_k the zoo network's k-th map, p a place
    lpips     sum_k mean_p sum_c w_kc (u_k(x)_pc - u_k(y)_pc)^2   on VGG, w learned; the lpips package's (Zhang 2018)

All `(B, ...), (B, ...) -> (B,)`, in the dtype of x, differentiable in both; zero for x = y.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.errors import TsAdaptError, unknown
from ts_adapt.interfaces import Distance
from ts_adapt.numerics import dtype_of
from ts_adapt.zoo.features import load_features
from ts_adapt.zoo.networks import GREY

_SMALL = 1e-6  # under the root of |h|: keeps gradients finite where a map is silent


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of each sample, `(B,)`."""
    _check(x, y)
    return (x - y).square().flatten(1).mean(1)


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error of each sample, `(B,)`."""
    _check(x, y)
    return (x - y).abs().flatten(1).mean(1)


class FeatureDistance:
    """Squared distance of unit-normalised feature maps, averaged over places and layers; LPIPS without its weights.

    network  images `(B, ...)` -> an object with `maps`, a sequence of `(B, C, ...)`, such as `zoo.FeatureNet`
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.towards(y)(x)

    def towards(self, y: Tensor) -> Callable[[Tensor], Tensor]:
        """x -> the distance to `y`, whose maps are made once."""
        there = self._units(y)

        def distance(x: Tensor) -> Tensor:
            _check(x, y)
            pairs = zip(self._units(x), there, strict=True)
            layers = [(a - b).square().sum(1).flatten(1).mean(1) for a, b in pairs]
            return torch.stack(layers).mean(0).to(x.dtype)

        return distance

    def features(self, x: Tensor) -> Tensor:
        """The last map's mean over its places, `(B, C)`."""
        return self._maps(x)[-1].flatten(2).mean(2)

    def _units(self, x: Tensor) -> list[Tensor]:
        """The maps of `x`, of norm 1 at each place."""
        return [_unit(h) for h in self._maps(x)]

    def _maps(self, x: Tensor) -> Sequence[Tensor]:
        maps: Sequence[Tensor] = self.network(x.to(dtype_of(self.network, x.dtype))).maps
        return maps


class LPIPSDistance:
    """LPIPS of colour images `(B, 3, H, W)`; grey ones are repeated to three channels. `network`: an `lpips.LPIPS`."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        _check(x, y)
        distance: Tensor = self.network(self._colours(x), self._colours(y))
        return distance.flatten(1).mean(1).to(x.dtype)

    def features(self, x: Tensor) -> Tensor:
        """The means of VGG's maps over their places, one behind the other, `(B, D)`."""
        network: Any = self.network
        maps = network.net(network.scaling_layer(self._colours(x)))
        return torch.cat([h.flatten(2).mean(2) for h in maps], 1)

    def _colours(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise TsAdaptError(
                f"lpips compares images (B, 1, H, W) or (B, 3, H, W); got {tuple(x.shape)}: "
                "decode latents first, or use l2"
            )
        return x.to(dtype_of(self.network, x.dtype)).expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class Changed:
    """`change` `(B,)` -> `(B,)` of the values of `distance`."""

    distance: Distance
    change: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.change(self.distance(x, y))

    def towards(self, y: Tensor) -> Callable[[Tensor], Tensor]:
        to_y = towards(self.distance, y)
        return lambda x: self.change(to_y(x))


def logarithm(distance: Distance) -> Changed:
    """The logarithm of `distance`, whose mean over samples is that of the geometric mean."""
    return Changed(distance, lambda found: found.clamp_min(torch.finfo(found.dtype).tiny).log())


def capped(distance: Distance, most: float) -> Changed:
    """`distance` where it is below `most`, else that: what is farther off counts alike, and says of no direction."""
    return Changed(distance, lambda found: torch.where(found.isfinite(), found.clamp(max=most), found))


def towards(distance: Distance, y: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> `distance(x, y)`, for many x: what it makes of y alone is made once, where it has a method `towards`."""
    once: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = getattr(distance, "towards", None)
    return once(y) if once is not None else lambda x: distance(x, y)


def features_of(distance: Distance) -> Callable[[Tensor], Tensor]:
    """x `(B, ...)` -> the features `(B, D)` that `distance` sees images by: its network's, else their values."""
    look: Callable[[Tensor], Tensor] | None = getattr(distance, "features", None)
    return look if look is not None else lambda x: x.flatten(1)


def _features(device: torch.device | str, network: nn.Module | None, shape: Sequence[int]) -> Distance:
    known = load_features(shape=tuple(shape)) if network is None else network
    return FeatureDistance(_frozen(known, device))


def _lpips(device: torch.device | str, network: nn.Module | None, shape: Sequence[int]) -> Distance:
    return LPIPSDistance(_frozen(network if network is not None else _pretrained_lpips(), device))


DISTANCES: dict[str, Callable[[torch.device | str, nn.Module | None, Sequence[int]], Distance]] = {
    "l2": lambda device, network, shape: l2,
    "l1": lambda device, network, shape: l1,
    "features": _features,
    "lpips": _lpips,
}


LOOKS = {"l2": "pixels", "l1": "pixels", "features": "zoo", "lpips": "vgg"}
"""Of each distance, whose features `features_of` gives: the name of the extractor of `evaluation` that has the same."""


def make(
    name: str,
    device: torch.device | str = "cpu",
    network: nn.Module | None = None,
    shape: Sequence[int] = GREY,
) -> Distance:
    """The distance called `name`, its network on `device`.

    network  another feature network in place of the zoo's (see `FeatureDistance`), or a built `lpips.LPIPS`; it is
             frozen and put in evaluation mode; l1 and l2 have none
    shape    (C, H, W) of the images, for which the zoo's network is chosen

    Raises TsAdaptError for an unknown name, for a shape that the zoo has no network for, and for lpips where its
    pretrained weights cannot be had.
    """
    if name not in DISTANCES:
        raise unknown("distance", name, DISTANCES)
    return DISTANCES[name](device, network, shape)


def _pretrained_lpips() -> nn.Module:
    try:
        import lpips

        network: nn.Module = lpips.LPIPS(net="vgg", verbose=False)
    except (ImportError, OSError, RuntimeError) as error:
        raise TsAdaptError(
            f"lpips cannot be built, it needs its package and VGG's pretrained weights from a network ({error}); put "
            f"them, torchvision's vgg16-397923af.pth, into {torch.hub.get_dir()}/checkpoints, or use --distance "
            "features or --distance l2"
        ) from error
    return network


def _frozen(network: nn.Module, device: torch.device | str) -> nn.Module:
    return network.eval().requires_grad_(False).to(device)


def _unit(h: Tensor) -> Tensor:
    return h * torch.rsqrt(h.square().sum(1, keepdim=True) + _SMALL)


def _check(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or x.ndim < 2:
        raise TsAdaptError(
            f"a distance compares two batches of the same shape (B, ...); got {tuple(x.shape)} and {tuple(y.shape)}"
        )
