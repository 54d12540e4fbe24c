"""python -m emoji data | autoencoder | judges | sd | sd3 | sheet | quality, in this order; each takes --help.
`steps` draws what few steps make with the model and the schedules of the zoo, and needs none of the others.

Trainings run under `torchrun --nproc-per-node 2 -m emoji` too, and go on where they were killed; all that they write
lies in --folder, under their names.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from emoji import data
from emoji.autoencoder import train_autoencoder
from emoji.judges import train_distance, train_judge
from emoji.matching import train_matching
from emoji.quality import quality
from emoji.sd import train_sd
from emoji.sd3 import train_sd3
from emoji.sheet import sheet
from emoji.steps import steps
from training import Plan
from ts_adapt.errors import TsAdaptError

LENGTHS = {
    "autoencoder": (112_000, 32, 1.5e-3),
    "sd": (600_000, 64, 1.2e-3),
    "sd3": (800_000, 64, 8e-4),
    "judges": (200_000, 64, 2e-3),
}
"""Of each training: images, batch, and the highest learning rate."""
OF_PIPELINES = {"sheet": 64, "quality": 960}
"""Of what looks at a trained pipeline: how many prompts."""
JUDGES = {"distance": train_distance, "judge": train_judge, "matching": train_matching}
"""In the order of their seeds: the first has that after the one given."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="emoji", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for what in ("data", *LENGTHS, *OF_PIPELINES, "steps"):
        command = commands.add_parser(what, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument("--folder", type=Path, default=data.FOLDER)
        command.add_argument("--seed", type=int, default=0)
        if what in LENGTHS:
            images, batch, peak = LENGTHS[what]
            command.add_argument("--images", type=int, default=images, help="that the training sees")
            command.add_argument("--batch", type=int, default=batch, help="of all processes together")
            command.add_argument("--lr", type=float, default=peak, help="the highest learning rate")
            command.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    for what, count in OF_PIPELINES.items():
        command = commands.choices[what]
        command.add_argument("--of", choices=("sd", "sd3"), default="sd", help="the model whose pictures are looked at")
        command.add_argument("--count", type=int, default=count, help="of prompts")
        command.add_argument("--steps", type=int, default=30)
        command.add_argument("--guidance", type=float, default=4.0)
    commands.choices["sheet"].add_argument("--out", type=Path, default=data.FOLDER / "sheet.png")
    commands.choices["quality"].add_argument("--held-out", action="store_true", help="pictures that no training saw")
    commands.choices["steps"].add_argument("--guidance", type=float, default=4.0)
    commands.choices["steps"].add_argument("--out", type=Path, default=Path("docs/emoji-steps.png"))
    given = parser.parse_args(arguments)
    try:
        run(given)
    except TsAdaptError as error:
        raise SystemExit(f"emoji: {error}") from None


def run(given: argparse.Namespace) -> None:
    """Do what was asked for."""
    folder: Path = given.folder
    if given.what == "data":
        print(json.dumps(data.summary(data.build(folder, given.seed))))
        return
    if given.what == "steps":
        steps(given.guidance, given.out)
        return
    pictures = data.load(folder)
    if given.what in OF_PIPELINES:
        pipeline, how = folder / given.of / "pipeline", (given.count, given.steps, given.guidance, given.seed)
        if given.what == "sheet":
            sheet(pictures, pipeline, *how).save(given.out)
        else:
            print(json.dumps(quality(pictures, pipeline, folder, *how, given.held_out)))
        return

    def plan(name: str, seed: int) -> Plan:
        return Plan(folder / name, given.images, given.batch, given.lr, given.every, seed)

    vae = folder / "autoencoder" / "vae"
    if given.what == "autoencoder":
        train_autoencoder(pictures, plan("autoencoder", given.seed))
    elif given.what == "sd":
        train_sd(pictures, vae, plan("sd", given.seed))
    elif given.what == "sd3":
        train_sd3(pictures, vae, plan("sd3", given.seed))
    else:
        for number, (name, train) in enumerate(JUDGES.items(), start=1):
            train(pictures, plan(name, given.seed + number))


if __name__ == "__main__":
    main()
