"""Draw docs/gallery.png: the first eight test noises on fixed and learned schedules, beside the teacher.

    python scripts/gallery.py --config configs/plain.yml

The number below a row's name is the mean distance to the teacher's images, over all test samples that have an oracle's
grid. Images of one channel are coloured by their difference from the teacher's: red where too bright, cyan where too
dark. Takes what `make results` left in the workspace and writes nothing else; options of the config are flags here too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ts_adapt  # noqa: F401  (first: it makes torchvision importable beside a CPU torch)

# isort: split
import torch
from torch.nn.functional import interpolate

from ts_adapt.cli import parse
from ts_adapt.interfaces import TimeGrid
from ts_adapt.jobs.session import Session
from ts_adapt.plots import plot_images
from ts_adapt.schedules.resolve import resolve

SCHEDULES = {
    "linear": "linear",
    "karras": "Karras",
    "ays-svd": "AYS (SVD)",
    "static": "static, learned",
    "oracle": "oracle grids",
    "recursive": "recursive, learned",
}
NFE, COUNT, SCALE = 5, 8, 4


def main() -> None:
    config = parse(["evaluate", *sys.argv[1:]]).config
    session, name = Session(config), config.solvers[0]
    labels = session.labelled("test", name, NFE)
    objective, batch = session.objective(session.solver(name)), labels.batch
    shown, pictures = batch.rows(slice(0, COUNT)), {}
    with torch.inference_mode():
        for schedule, title in SCHEDULES.items():
            policy = labels.grid if schedule == "oracle" else session.policy(resolve(schedule, session), name, NFE)
            distance = float(objective.measure(policy, batch).mean())
            first = policy.rows(slice(0, COUNT)) if isinstance(policy, TimeGrid) else policy
            pictures[f"{title}\n{distance:.3f}"] = session.denoiser.decode(
                objective.student(first, shown), shown.condition
            )
        teacher = session.denoiser.decode(shown.target, shown.condition)
    pictures[f"teacher\n{config.teacher.nfe_of('test')} evaluations"], legend = teacher, ""
    if teacher.shape[1] == 1:
        pictures = {title: torch.cat([images, teacher, teacher], 1) for title, images in pictures.items()}
        legend = "      red: brighter than the teacher's, cyan: darker"
    rows = {
        title: interpolate(images.float(), scale_factor=SCALE, mode="bicubic") for title, images in pictures.items()
    }
    out = Path("docs/gallery.png")
    figure = plot_images(rows, f"{name}, {NFE} evaluations an image{legend}")
    figure.savefig(out, dpi=200, bbox_inches="tight", metadata={"Software": None})
    print(out)


if __name__ == "__main__":
    main()
