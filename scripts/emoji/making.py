"""Pictures of prompts, each from noise of a seed of its own."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ts_adapt.denoisers.load import load_pipeline

BATCH = 32
TOKENS = {"max_sequence_length": 16}
"""Of the T5 that SD3's pipeline has not: tokens that are zero, 256 by default, at three times the cost."""


def load(name: str | Path) -> Any:
    """The pipeline in the folder, or the zoo's of that name, in float32 and without a progress bar."""
    pipe = load_pipeline(str(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made(pipe: Any, prompts: list[str], steps: int, guidance: float, seed: int) -> Tensor:
    """Pictures `(n, 3, 64, 64)` in [-1, 1] of the prompts; their seeds are `seed` and upwards."""
    few = TOKENS if TOKENS.keys() <= inspect.signature(type(pipe).__call__).parameters.keys() else {}
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt", **few}
    pictures = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        generators = [torch.Generator().manual_seed(seed + start + number) for number in range(len(part))]
        pictures.append(2 * pipe(part, generator=generators, **options).images.float() - 1)
    return torch.cat(pictures)
