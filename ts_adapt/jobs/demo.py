"""demo: teach, search, train and evaluate, one behind the other, with the options of configs/demo.yml.

It leaves the config that it ran with beside its results, so that every other command can go on with its files.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import yaml

from ts_adapt.config import Config
from ts_adapt.evaluation.records import STATIC
from ts_adapt.jobs.evaluate import evaluate
from ts_adapt.jobs.search import search
from ts_adapt.jobs.session import Session
from ts_adapt.jobs.teach import teach
from ts_adapt.jobs.train import train
from ts_adapt.predictors.store import PREDICTORS
from ts_adapt.storage.files import write_bytes

CORRECTION = "shift"
PROGRAM = "ts-adapt"


def demo(config: Config, *, redo: bool = False, progress: bool = True) -> Path:
    """Do the main job of `config`, print what came out and how to go on, and return the report's path.

    redo  as in `search` and `train`: what was searched or trained with other options is replaced
    """
    session, began = Session(config, progress=progress), time.monotonic()

    def say(step: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {step}", flush=True)

    say(f"teach: {config.teacher.nfe}-step solves of the embedded model, for learning and for the test")
    teach(session)
    say("search: one grid for all samples (static)")
    search(session, "static", redo=redo)
    say("search: from there on, the times told to the network as well (static+shift)")
    corrected = replace(config, static=replace(config.static, corrections=[CORRECTION]))
    search(Session(corrected, progress=progress), "static", redo=redo)
    say("search: the best grid for each test sample (the oracle)")
    search(session, "per-sample", "test", redo=redo)
    for kind in PREDICTORS:
        say(f"train: a predictor of grids with corrections ({kind})")
        train(session, kind, redo=redo)
    say(f"evaluate: every schedule on the same {config.evaluate.samples} test noises")
    _, report = evaluate(session)
    kept = write_config(config, session.workspace.config)
    say("done")
    print("\n".join(["", f"The report is {report}. To go on with what was learned here:", *next_commands(kept)]))
    return report


def write_config(config: Config, path: Path) -> Path:
    """`config`, every option of it, as a YAML file that --config takes."""
    write_bytes(path, yaml.safe_dump(asdict(config), sort_keys=False).encode())
    return path


def next_commands(config: Path) -> list[str]:
    """Commands that run as they stand, in the folder of this run, on the files of the run that left `config`."""
    corrected = f"{STATIC}+{CORRECTION}"
    commands = [
        ["sample", "--config", config, "--schedule", "recursive", "--count", "64"],
        ["sample", "--config", config, "--schedule", corrected],
        ["sample", "--config", config, "--schedule", "karras"],
        ["export", STATIC, "--config", config, "--format", "sigmas"],
        ["export", STATIC, "--config", config, "--format", "diffusers", "--out", config.parent / "scheduler"],
        ["search", "--config", config, "--method", "dmn"],
        ["evaluate", "--config", config],
    ]
    return [f"    {shlex.join(map(str, [*_program(), *words]))}" for words in commands]


def _program() -> list[str]:
    """How this program is called here: by its name where the shell finds it, else by its file, else by python."""
    called = Path(sys.argv[0])
    if called.name != PROGRAM:
        return [sys.executable, "-m", "ts_adapt.cli"]
    found = shutil.which(PROGRAM)
    return [PROGRAM] if found and Path(found).resolve() == called.resolve() else [str(called)]
