"""How a pipeline ends: the pictures that it makes of its last state, in [-1, 1] and with gradients.

    processor      the pipeline's processor of images or videos, which is kept from mapping [-1, 1] to [0, 1] and from
                   clamping, where gradients would end
    autoencoder    what the autoencoder decodes, where there is no processor; the rest of the pipeline is left out
    states         the states themselves: it makes no pictures

Which of them a pipeline has is found the first time that it ends, without gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.denoisers.network import prediction_of
from ts_adapt.errors import TsAdaptError
from ts_adapt.pipelines.student import Left

PROCESSORS = ("image_processor", "video_processor")
AUTOENCODERS = ("vae", "movq", "vqvae")
NO_PICTURES = ("safety_checker", "watermark")
"""Components that change finished pictures."""


def side_by_side(images: Tensor) -> Tensor:
    """The frames of films `(B, frames, C, H, W)` as one picture each, `(B, C, H, frames W)`; pictures as they are."""
    return images.permute(0, 2, 3, 1, 4).flatten(3) if images.ndim == 5 else images


class Ending:
    """The end of `pipe`, whose processors are replaced by copies, and which is freed of `NO_PICTURES`."""

    def __init__(self, pipe: Any) -> None:
        self.way: str | None = None
        self.processed = False
        for key in NO_PICTURES:
            if getattr(pipe, key, None) is not None:
                setattr(pipe, key, None)
        for key in PROCESSORS:
            processor: Any = getattr(pipe, key, None)
            if hasattr(processor, "denormalize"):
                processor = copy.copy(processor)
                processor.denormalize = self._as_they_are
                setattr(pipe, key, processor)
        found = (getattr(pipe, key, None) for key in AUTOENCODERS)
        self.autoencoder = next((module for module in found if isinstance(module, nn.Module)), None)

    def pictures(self, x: Tensor, run: Callable[[Tensor], Any]) -> Tensor:
        """Of states `x` `(B, ...)` the pictures `(B, C, H, W)`, the frames of a video side by side.

        run  calls the pipeline so that it ends in the states that it is given, and returns what it returned: a tuple,
             or None where it was left
        """
        if self.way is None:
            with torch.inference_mode(False), torch.no_grad():
                self.way = self._found(x[:1].detach().clone(), run)
        if self.way == "states":
            return x
        with self._heard(leave=self.way == "autoencoder") as decoded:
            made = run(x)
        images: Tensor = decoded[0] if self.way == "autoencoder" else made[0]
        images = side_by_side(images)
        if len(images) != len(x):
            raise TsAdaptError(f"{len(x)} states have become {len(images)} pictures; decode one at a time")
        return images.to(x.dtype)

    def _found(self, x: Tensor, run: Callable[[Tensor], Any]) -> str:
        with self._heard(leave=False) as decoded:
            made = run(x)
        first = made[0] if isinstance(made, tuple) else None
        if self.processed and isinstance(first, Tensor) and first.ndim in (4, 5):
            return "processor"
        return "autoencoder" if len(decoded) == 1 and decoded[0].ndim == 4 else "states"

    def _as_they_are(self, images: Any) -> Any:
        self.processed = True
        return images

    @contextmanager
    def _heard(self, leave: bool) -> Iterator[list[Tensor]]:
        """What the autoencoder decodes within the block; `leave` the pipeline at the first of it."""
        decoded: list[Tensor] = []
        autoencoder: Any = self.autoencoder
        if autoencoder is None:
            yield decoded
            return
        decode = autoencoder.decode

        def listening(*args: Any, **kwargs: Any) -> Any:
            out = decode(*args, **kwargs)
            decoded.append(prediction_of(out))
            if leave:
                raise Left
            return out

        autoencoder.decode = listening
        try:
            yield decoded
        finally:
            del autoencoder.decode
