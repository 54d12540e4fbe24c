"""Kill every job at random moments, run it again, and compare what it leaves with what an unbroken run left.

    python scripts/soak.py --kills 20

The jobs are those of configs/gaussian.yml, made smaller. One process imports everything and forks; its children run a
job each and are killed by SIGKILL after a random while, so that kills meet the work and not the imports. A job is begun
anew, in a fresh copy of what it needs, until it has had its kills. Files are compared byte for byte; what tells the
time is left out by name (`TIMED`), as are logs, locks and the storage of blackbox's trials. The last line is JSON:

    kills      in all        lost       files that were there after a kill, or should be at the end, and are not
    differing  files that are not those of the unbroken run, or should not be there; exit code 1 for either
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ts_adapt  # first: it makes torchvision importable beside a CPU torch

# isort: split
import matplotlib.pyplot
import torch
from accelerate import Accelerator

import ts_adapt.jobs.learn  # noqa: F401  (what the jobs import when they need it)
from ts_adapt.cli import main as ts_adapt_main
from ts_adapt.storage.files import read_tensors, sha256_of_tensors

CONFIG = Path(__file__).parents[1] / "configs/gaussian.yml"
SMALLER = {
    "name": "soak", "nfe": "[3]", "static_samples": "32", "label_samples": "64", "oracle_samples": "32",
    "label_batch": "8", "teacher.train_samples": "96", "teacher.test_samples": "48", "teacher.shard_size": "8",
    "teacher.batch_size": "8", "static.iterations": "15", "static.starts": "3", "per_sample.iterations": "10",
    "per_sample.random_starts": "0", "blackbox.trials": "8", "train.samples": "80", "train.epochs": "6",
    "train.loss": "both", "train.label_epochs": "10", "train.width": "4", "train.hidden": "16",
    "evaluate.samples": "48", "evaluate.batch_size": "16",
}  # fmt: skip
JOBS = {
    "teach": ["teach"],
    "search static": ["search"],
    "search per-sample": ["search", "--method", "per-sample"],
    "search blackbox": ["search", "--method", "blackbox"],
    "train": ["train", "--predictor", "recursive"],
    "evaluate": ["evaluate"],
}
TIMED = ("seconds", "seconds_per_image", "peak_memory", "cost")
"""Fields of tables and tensors of runs that no two runs have in common."""
PAGES = (".html", ".md")
"""Of evaluate: they show what the table has, the fields of time too, so they only have to be there."""
UNCOMPARED = ("tensorboard", "optuna.db", ".lock")


def run(arguments: list[str], folder: Path, delay: float | None = None) -> int:
    """The exit code of a job in a process of its own, which is killed after `delay` seconds (None: never)."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            with open(folder / "output.txt", "a") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                options = [text for name, value in SMALLER.items() for text in (f"--{name}", value)]
                roots = ["--data_root", str(folder / "train_data"), "--log_root", str(folder / "logs")]
                command, *flags = arguments
                code = ts_adapt_main([command, "--config", str(CONFIG), "--quiet", *options, *roots, *flags])
        finally:
            os._exit(code)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(folder: Path) -> dict[str, str]:
    """What is compared of every file of an experiment: a text that tells it, by its path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name != "output.txt" and not any(part in name for part in UNCOMPARED):
            found[name] = told(path)
    return found


def told(path: Path) -> str:
    if path.parent.name == "runs" and path.suffix == ".safetensors":
        return sha256_of_tensors({key: value for key, value in read_tensors(path).items() if key not in TIMED})
    if path.name == "results.csv":
        rows = list(csv.DictReader(path.read_text().splitlines()))
        return json.dumps([{key: value for key, value in row.items() if key not in TIMED} for row in rows])
    if path.name == "results.json":
        return json.dumps(without_time(json.loads(path.read_text())))
    if "logs" in path.parts and path.suffix in PAGES:
        return "there" if path.stat().st_size else "empty"
    return path.read_bytes().hex()


def without_time(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_time(entry) for key, entry in value.items() if key not in TIMED}
    return [without_time(entry) for entry in value] if isinstance(value, list) else value


@dataclass
class Tally:
    """What has happened so far; `found` says which files."""

    kills: int = 0
    lost: int = 0
    differing: int = 0
    found: list[str] = field(default_factory=list)


def soak(
    job: str, before: Path, after: Path, seconds: float, kills: int, work: Path, draw: Callable[[], float]
) -> Tally:
    """Kill `job` `kills` times, from the state `before` on; `after` is where an unbroken run of `seconds` ended."""
    tally, wanted, there_before = Tally(), content(after), content(before).keys()
    while tally.kills < kills:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(before, work)
        there: set[str] = set()
        while True:
            last = tally.kills >= kills
            code = run(JOBS[job], work, None if last else 0.7 * seconds * draw())
            if code == 0:
                break
            if code != -signal.SIGKILL:
                raise RuntimeError(f"{job} ended with {code}: {(work / 'output.txt').read_text()[-2000:]}")
            tally.kills += 1
            now = {str(path.relative_to(work)) for path in work.rglob("*")} & wanted.keys()
            note(tally, "lost", job, there - now)
            there = now
        found = content(work)
        note(tally, "lost", job, wanted.keys() - found.keys())
        others = {name for name in found if found[name] != wanted.get(name)}
        note(tally, "differing", job, others - (there_before - wanted.keys()))
    return tally


def note(tally: Tally, what: str, job: str, names: set[str]) -> None:
    setattr(tally, what, getattr(tally, what) + len(names))
    tally.found += [f"{what}: {job}: {name}" for name in sorted(names)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each job")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), metavar="JOB")
    args = parser.parse_args()
    torch.set_num_threads(1)
    matplotlib.pyplot.close(matplotlib.pyplot.figure())
    Accelerator(cpu=True)
    generator, total = random.Random(args.seed), Tally()
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        state = Path(place) / "start"
        state.mkdir()
        for job in JOBS:
            after = Path(shutil.copytree(state, Path(place) / job.replace(" ", "-")))
            began = time.monotonic()
            if run(JOBS[job], after) != 0:
                raise RuntimeError(f"{job} failed: {(after / 'output.txt').read_text()[-2000:]}")
            seconds = time.monotonic() - began
            if job in args.jobs:
                tally = soak(job, state, after, seconds, args.kills, Path(place) / "work", generator.random)
                total.kills, total.lost = total.kills + tally.kills, total.lost + tally.lost
                total.differing, total.found = total.differing + tally.differing, total.found + tally.found
                told_so_far = f"{tally.kills} kills, {tally.lost} lost, {tally.differing} differing"
                print(f"{job}, {seconds:.1f} s unbroken: {told_so_far}", flush=True)
            state = after
    print(*total.found, sep="\n", end="\n" if total.found else "")
    print(json.dumps({"kills": total.kills, "lost": total.lost, "differing": total.differing}))
    return int(total.lost + total.differing > 0)


if __name__ == "__main__":
    sys.exit(main())
