"""A tiny experiment on the analytic mixture, and the command line at work in its folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ts_adapt import zoo
from ts_adapt.cli import main, parse
from ts_adapt.jobs.session import Session
from ts_adapt.storage.files import read_json, read_tensors, sha256_of_tensors

SMALL = """
name: small
model: {name: gaussian-mixture}
solvers: [unipc-2]
nfe: [3]
distance: l2
static_samples: 8
label_samples: 20
oracle_samples: 10
label_batch: 10
teacher: {solver: unipc-3, nfe: 12, train_samples: 40, test_samples: 20, shard_size: 16, batch_size: 16}
static: {iterations: 2, corrections: []}
per_sample: {iterations: 2, random_starts: 0}
train: {loss: both, samples: 20, epochs: 1, label_epochs: 2, width: 4, hidden: 16}
evaluate: {samples: 20, features: pixels, batch_size: 16, grids: [karras, linear]}
"""
LABEL = ("search", "--method", "per-sample")
WHOLE_JOB = (("teach",), ("search",), LABEL, (*LABEL, "--split", "test"), ("train",), ("evaluate",))


@dataclass(frozen=True)
class Job:
    """The experiment in `folder`: its commands, and where they leave what they make."""

    folder: Path

    @classmethod
    def begun(cls, folder: Path, config: str = SMALL) -> Job:
        (folder / "small.yml").write_text(config)
        return cls(folder)

    @property
    def roots(self) -> list[str]:
        return ["--data_root", str(self.data.parent), "--log_root", str(self.folder / "logs")]

    @property
    def options(self) -> list[str]:
        return ["--config", str(self.folder / "small.yml"), *self.roots]

    def run(self, command: str, *flags: str) -> int:
        return main([command, *self.options, "--quiet", *flags])

    def do(self, *steps: Sequence[str]) -> Job:
        """Itself, with these commands done, one after the other."""
        for step in steps:
            assert self.run(*step) == 0, step
        return self

    def session(self, *flags: str) -> Session:
        """What the commands work with."""
        return Session(parse(["learn", *self.options, *flags]).config, progress=False)

    def refused(self, capsys: Any, *arguments: str) -> str:
        """The one sentence of a refused command."""
        capsys.readouterr()
        assert self.run(*arguments) == 2
        return sentence(capsys)

    @property
    def data(self) -> Path:
        return self.folder / "train_data/small"

    @property
    def static(self) -> Path:
        return self.data / "static/unipc-2-nfe3.json"

    @property
    def predictor(self) -> Path:
        return self.data / "predictors/recursive/unipc-2-nfe3"

    @property
    def logs(self) -> Path:
        return self.folder / "logs/small"

    @property
    def runs(self) -> Path:
        return self.logs / "runs"

    @property
    def results(self) -> dict[str, Any]:
        """What the last evaluation left in results.json."""
        found: dict[str, Any] = read_json(self.logs / "results.json")
        return found

    def rows(self, samples: int | None = None) -> list[dict[str, str]]:
        """The lines of results.csv; those on so many samples."""
        with open(self.logs / "results.csv", newline="") as file:
            return [row for row in csv.DictReader(file) if samples in (None, int(row["samples"]))]

    def labels(self, split: str = "train") -> Path:
        return self.data / "labels" / split / "unipc-2-nfe3"

    def content(self) -> dict[str, str]:
        """What the experiment has made, without what tells the time."""
        found = {}
        for path in sorted([*self.data.rglob("*"), *self.runs.rglob("*")]):
            name = path.relative_to(self.folder)
            if path.suffix == ".safetensors":
                kept = read_tensors(path)
                found[str(name)] = sha256_of_tensors({key: kept[key] for key in kept if key not in ("seconds", "cost")})
            elif path.is_file() and path.suffix != ".lock" and path.name != ".lock" and path.name != "optuna.db":
                found[str(name)] = path.read_text()
        return found


def real_images(folder: Path, count: int) -> Path:
    """The new `folder`, with so many images of the embedded data."""
    folder.mkdir()
    for number, image in enumerate(zoo.test_images()[0][:count, 0].numpy()):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


def sentence(capsys: Any) -> str:
    """What was printed, which is one sentence on stderr."""
    printed = capsys.readouterr()
    message: str = printed.err.strip()
    assert printed.out == "" and message.startswith("ts-adapt: ")
    assert "Traceback" not in message and "\n" not in message
    return message


def edit(path: Path, **values: object) -> None:
    """Replace some of the values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
