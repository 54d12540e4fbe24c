"""Draw docs/gallery.png: the same eight test noises on fixed and learned schedules, beside the teacher.

    python scripts/gallery.py --config configs/fashion.yml

Takes what `make results` left in the workspace; options of the config are flags here too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ts_adapt  # noqa: F401  (first: it makes torchvision importable beside a CPU torch)

# isort: split
import torch

from ts_adapt.cli import parse
from ts_adapt.jobs.session import Session
from ts_adapt.plots import plot_images

SCHEDULES, NFE, COUNT = ("linear", "karras", "static", "recursive"), 5, 8


def main() -> None:
    _, _, config = parse(["evaluate", *sys.argv[1:]])
    session, name = Session(config), config.solvers[0]
    _, batch = session.teacher("test", COUNT)
    objective = session.objective(session.solver(name))
    pictures = {}
    with torch.inference_mode():
        for schedule in SCHEDULES:
            end = objective.student(session.policy(schedule, name, NFE), batch)
            pictures[f"{schedule}, NFE {NFE}"] = session.denoiser.decode(end)
        pictures[f"teacher, NFE {config.teacher.nfe}"] = session.denoiser.decode(batch.target)
    out = Path("docs/gallery.png")
    plot_images(pictures, f"{config.model.name}, {name}").savefig(out, dpi=110, metadata={"Software": None})
    print(out)


if __name__ == "__main__":
    main()
