"""What few steps make of the same noises: schedules of the zoo beside DPM-Solver++ as diffusers has it.

The noise of each picture is drawn from a seed of its own, 0 and upwards.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

import ts_adapt
from ts_adapt import zoo
from ts_adapt.denoisers.load import load_pipeline
from ts_adapt.plots import plot_images

PROMPTS = (
    "fluent red heart",
    "noto woman astronaut with dark skin tone",
    "fluent grinning face",
    "noto flag sweden",
    "noto santa claus with medium skin tone",
    "fluent person in lotus position with light skin tone",
    "noto man running with medium light skin tone",
    "fluent thumbs up with dark skin tone",
)
LEARNED, OWN = (3, 5, 10), (5, 10, 40)
"""Numbers of steps along the learned schedule, and of the pipeline's own solver."""


def steps(guidance: float, out: Path) -> None:
    """Draw the rows into the file `out`."""
    pipe = load_pipeline("emoji-sd")
    pipe.set_progress_bar_config(disable=True)

    def made(count: int) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
        images = pipe(
            list(PROMPTS), num_inference_steps=count, guidance_scale=guidance, generator=generators, output_type="pt"
        ).images
        return torch.nn.functional.interpolate(2 * images - 1, scale_factor=2, mode="bicubic")

    rows = {}
    ts_adapt.attach(pipe, ts_adapt.LearnedScheduler.from_pretrained(zoo.schedules()["emoji-sd-unipc-3-recursive"]))
    for count in LEARNED:
        rows[f"recursive, learned\n{count} steps"] = made(count)
    ts_adapt.detach(pipe)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    for count in OWN:
        rows[f"DPM-Solver++\n{count} steps"] = made(count)
    figure = plot_images(rows, f"emoji-sd, guidance {guidance:g}")
    figure.savefig(out, dpi=120, bbox_inches="tight", metadata={"Software": None})
