"""A contact sheet: what a pipeline makes of held-out prompts, beside the real pictures.

Prompts are spread evenly over all that are held out; of each pair the left one is real.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from emoji.data import SIZE, Data
from emoji.making import load, made
from ts_adapt.zoo.data import to_uint8

ACROSS, GAP = 8, 4


def sheet(data: Data, pipeline: Path, count: int, steps: int, guidance: float, seed: int) -> Image.Image:
    """Pairs for `count` held-out prompts; the noise of each is drawn from a seed of its own, `seed` and upwards."""
    pictures = data.part(True)
    rows = chosen(len(pictures.entries), count)
    prompts = [pictures.entries[row].caption for row in rows]
    real, own = pictures.pictures[rows], to_uint8(made(load(pipeline), prompts, steps, guidance, seed))
    return pairs(*(x.permute(0, 2, 3, 1).numpy() for x in (real, own)))


def chosen(of: int, count: int) -> list[int]:
    """`count` places spread evenly over a list that is `of` long; all of them, if it is shorter."""
    return torch.linspace(0, of - 1, min(count, of)).round().int().tolist()


def pairs(real: np.ndarray, made: np.ndarray) -> Image.Image:
    """Pictures `(n, 64, 64, 3)` uint8 side by side, ACROSS pairs a row."""
    width, height = 2 * SIZE + GAP, SIZE + GAP
    page = Image.new("RGB", (ACROSS * width - GAP, -(-len(real) // ACROSS) * height - GAP), "grey")
    for number, (left, right) in enumerate(zip(real, made, strict=True)):
        x, y = number % ACROSS * width, number // ACROSS * height
        page.paste(Image.fromarray(left), (x, y))
        page.paste(Image.fromarray(right), (x + SIZE, y))
    return page
