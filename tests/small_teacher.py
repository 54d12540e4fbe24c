"""Small teachers of a Gaussian: six times, pictures of 1x4x4, shards of 4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ts_adapt.denoisers.analytic import GaussianDenoiser
from ts_adapt.noise import ContinuousVP
from ts_adapt.solvers import DDIM
from ts_adapt.teacher.generate import generate, teacher_config
from ts_adapt.teacher.store import TeacherStore

SHAPE = (1, 4, 4)
NOISE = ContinuousVP()
TIMES = torch.linspace(1, 1e-3, 6, dtype=torch.float64)


def gaussian(noise_schedule: Any = NOISE, mean: float = 0.3) -> GaussianDenoiser:
    return GaussianDenoiser(noise_schedule, mean, 0.25, SHAPE)


def make(folder: Path, samples: int = 10, *, keep: bool = True, solver: Any = None, **options: Any) -> TeacherStore:
    """The teacher in `folder`, with `samples` that are generated; without any where not `keep`.

    options    denoiser, grid and save_png; any other is `teacher_config`'s
    """
    denoiser = options.pop("denoiser", None) or gaussian()
    times = options.pop("grid", TIMES)
    save_png, condition = options.pop("save_png", False), options.get("condition")
    settings: dict[str, Any] = {
        "model": "gaussian", "seed": 7, "first": 0, "shape": SHAPE, "shard_size": 4, "batch_size": 3,
    } | options  # fmt: skip
    store = TeacherStore.create(folder, teacher_config(denoiser, "ddim", times, **settings))
    if keep:
        generate(
            denoiser, solver or DDIM(denoiser.noise_schedule), times, store, samples=samples,
            batch_size=settings["batch_size"], condition=condition, save_png=save_png, progress=False,
        )  # fmt: skip
    return store


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and p.name != ".lock"}
