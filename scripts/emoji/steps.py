"""What few steps make of the same noises: schedules of the zoo beside DPM-Solver++ as diffusers has it.

The noise of each picture is drawn from a seed of its own, 0 and upwards.
"""

from __future__ import annotations

from pathlib import Path

from diffusers import DPMSolverMultistepScheduler
from torch import Tensor
from torch.nn.functional import interpolate

import ts_adapt
from emoji.making import load, made
from ts_adapt import zoo
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
    pipe = load("emoji-sd")

    def row(count: int) -> Tensor:
        return interpolate(made(pipe, list(PROMPTS), count, guidance, seed=0), scale_factor=2, mode="bicubic")

    rows = {}
    ts_adapt.attach(pipe, ts_adapt.LearnedScheduler.from_pretrained(zoo.schedules()["emoji-sd-unipc-3-recursive"]))
    for count in LEARNED:
        rows[f"recursive, learned\n{count} steps"] = row(count)
    ts_adapt.detach(pipe)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    for count in OWN:
        rows[f"DPM-Solver++\n{count} steps"] = row(count)
    figure = plot_images(rows, f"emoji-sd, guidance {guidance:g}")
    figure.savefig(out, dpi=120, bbox_inches="tight", metadata={"Software": None})
