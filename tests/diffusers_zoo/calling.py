"""How any pipeline of diffusers is called: arguments by the names in the signature of its `__call__`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusers_zoo.others import others
from diffusers_zoo.sizes import LENGTH, SIZE, WIDTH
from diffusers_zoo.stand_ins import picture

STEPS, FRAMES = 4, 5


def mask(row: int = 0) -> Image.Image:
    half = np.zeros((SIZE, SIZE), np.uint8)
    half[:, SIZE // 2 :] = 255
    return Image.fromarray(half)


def film(row: int = 0) -> list[Image.Image]:
    return [picture(row + frame) for frame in range(FRAMES)]


WORDS = ("a cat", "two dogs in the snow", "the sea at night")


def numbers(row: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + row))


def stacked(rows: Sequence[int], *shape: int) -> Tensor:
    return torch.stack([numbers(row, *shape) for row in rows])


FOR_A_ROW: dict[str, Callable[[int], Any]] = {
    "prompt": lambda row: WORDS[row % 3],
    "image": picture,
    "mask_image": mask,
    "control_image": picture,
    "source_prompt": lambda row: WORDS[(row + 1) % 3],
    "example_image": picture,
    "original_image": picture,
}
"""Arguments with one entry a sample."""
STACKED = {"image_embeds": (WIDTH,), "negative_image_embeds": (WIDTH,), "hint": (3, 4 * SIZE, 4 * SIZE)}
"""Arguments with one row a sample, by its shape."""
FOR_ALL: dict[str, Callable[[], Any]] = {
    "height": lambda: SIZE,
    "width": lambda: SIZE,
    "num_frames": lambda: FRAMES,
    "max_sequence_length": lambda: LENGTH,
    "num_inference_steps": lambda: STEPS,
    "video": film,
    "control_video": film,
    "conditioning_frames": film,
    "output_type": lambda: "latent",
}
"""Arguments that all samples share."""


def arguments(pipe: Any, rows: Sequence[int], **given: Any) -> dict[str, Any]:
    """The arguments of a call of `pipe` for samples `rows`, each drawn by its own generator."""
    signature = inspect.signature(type(pipe).__call__).parameters
    own = others(type(pipe).__name__)
    found: dict[str, Any] = {"generator": [torch.Generator().manual_seed(row) for row in rows]}
    found |= {key: make() for key, make in FOR_ALL.items()}
    for key, make in FOR_A_ROW.items():
        each = [make(row) for row in rows]
        found[key] = each if len(rows) > 1 else each[0]
    found |= {key: stacked(rows, *shape) for key, shape in STACKED.items()}
    if "prompt" not in signature and "batch_size" in signature:
        found["batch_size"] = len(rows)
    found |= {key: value(rows) if callable(value) else value for key, value in own.get("call", {}).items()} | given
    if len(rows) == 1:
        found["generator"] = found["generator"][0]
    return {key: value for key, value in found.items() if key in signature and key not in own.get("leave", ())}


def called(pipe: Any, rows: Sequence[int], **given: Any) -> Tensor:
    """What a call of `pipe` gives for `rows`: states where it gives states, else pictures, or sound, `(B, ...)`."""
    torch.manual_seed(0)  # some draw from what is global
    with torch.no_grad():
        out = pipe(**arguments(pipe, rows, **given))
    first = out[0] if isinstance(out, tuple) else next(iter(out.values())) if isinstance(out, dict) else out
    return _tensor(first)


def _tensor(given: Any) -> Tensor:
    if isinstance(given, Tensor):
        return given.detach().float()
    if isinstance(given, np.ndarray):
        return torch.from_numpy(given).float()
    if isinstance(given, Image.Image):
        return torch.from_numpy(np.asarray(given, np.float32) / 255)
    return torch.stack([_tensor(one) for one in given])
