"""Where everything is kept: the folders of an experiment, the names of the files in them, and what formats these have.

    data_root/<name>/
        teacher/<split>/                          manifest.json, shard-00000.safetensors, receipts, images/000000.png
        teacher/train/convergence.json            how far finer solves of a few samples are
        static/unipc-3-nfe5.json                  a grid for all samples; of static+shift, blackbox, dmn, ... likewise
        static/unipc-3-nfe5.journal               of its search, while that is under way
        derivatives/unipc-3-5-steps-32-samples.journal  how derivatives in time agree with differences
        blackbox/optuna.db                        trials
        labels/<split>/unipc-3-nfe5/              labels.json, part-00000.safetensors; of train+shift, ... likewise
        predictors/one-shot/unipc-3-nfe5/         config.json, model.safetensors; unipc-3-all/: one for all NFEs
        predictors/one-shot/unipc-3-nfe5.<key>.training      a training under way
        quantizers/<quantizer>-<options>/         config.json, model.safetensors, redone.json, layers.csv, .json, .png
        latents/<digest>.safetensors              of a folder of images, for training
        pruned/pruned-unipc-3-nfe5.json           the blocks that were left out
        students/<student>/                       static/, labels/, predictors/, ... for a cheaper network
    log_root/<name>/
        report.html, results.csv, .json, .md, plots/        the comparison
        images.csv, .json                         the scores of folders of images
        runs/                                     a file of each run, parts/, skipped.json, teacher.safetensors
        samples/static-unipc-3-nfe5/              grid.png, images/00000.png
        tensorboard/<job>/
        config.yml                                what `learn` ran with

Whoever writes a file or looks for one takes its name from here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ts_adapt.errors import TsAdaptError
from ts_adapt.storage.files import shortened

CONFIG, TENSORS = "config.json", "model.safetensors"
"""Of a predictor, and of a quantization: its tensors, and everything else."""
SCHEDULER_CONFIG = "scheduler_config.json"
"""What diffusers calls the file that is in the folder of every scheduler."""
METADATA = "metadata.csv"
"""What the library datasets calls the file that says of the pictures in a folder what is known of them."""
LOCK = ".lock"
MANIFEST, LABELS, REDONE = "manifest.json", "labels.json", "redone.json"
CONVERGENCE = "convergence.json"
LAYERS_TABLE, LAYERS_REPORT, LAYERS_PICTURE = "layers.csv", "layers.json", "layers.png"
RESULTS, RESULTS_TABLE, RESULTS_TEXT, REPORT = "results.json", "results.csv", "results.md", "report.html"
FOLDERS, FOLDERS_TABLE = "images.json", "images.csv"
"""The scores of folders of images."""
PLOTS, PARTS, SKIPPED, TEACHER_FEATURES = "plots", "parts", "skipped.json", "teacher.safetensors"
IMAGES, CONTACT_SHEET = "images", "grid.png"
SHARDS, RECEIPTS, LABEL_PARTS = "shard-*.safetensors", "shard-*.json", "part-*.safetensors"
SHARD_NAME = re.compile(r"shard-\d{5,}\.safetensors")
ALL = "-all"
"""Behind a kind of predictor: one that serves all NFEs of an experiment, beside those for one each."""


@dataclass(frozen=True)
class Format:
    """What a JSON file says that it is, under `format` and `version`."""

    name: str
    version: int

    @property
    def head(self) -> dict[str, Any]:
        """The entries that say it."""
        return {"format": self.name, "version": self.version}

    def check(self, content: Any, what: Path | str, remedy: str) -> None:
        """TsAdaptError, naming `what` and ending with the `remedy`, unless `content` is an object of this format."""
        found = [content.get(key) for key in self.head] if isinstance(content, Mapping) else [None, None]
        if found == [None, None]:
            raise TsAdaptError(f"{what} is of no known format, expected {self.name!r}; {remedy}")
        if found != [self.name, self.version]:
            name, version = (shortened(repr(value)) for value in found)
            raise TsAdaptError(
                f"{what} is of the format {name}, version {version}; expected {self.name!r}, version {self.version}; "
                f"{remedy}"
            )


TEACHER = Format("ts_adapt-teacher", 1)
LABEL_FOLDER = Format("ts_adapt-labels", 1)
SCHEDULE = Format("ts_adapt-schedule", 1)
PREDICTOR = Format("ts_adapt-predictor", 4)
QUANTIZATION = Format("ts_adapt-quantization", 1)
PRUNED_NETWORK = Format("ts_adapt pruned network", 1)


@dataclass(frozen=True)
class Workspace:
    """Where an experiment keeps its things.

    data     what is generated and learned
    logs     results, samples and TensorBoard files
    student  the name of the network that schedules are learned for; empty for the teacher's own
    """

    data: Path
    logs: Path
    student: str = ""

    @property
    def learned(self) -> Path:
        """The schedules that are learned for one network."""
        return self.data / "students" / self.student if self.student else self.data

    def teacher(self, split: str) -> Path:
        return self.data / "teacher" / split

    def shared(self, method: str, solver: str, nfe: int) -> Path:
        return self.learned / method / f"{served(method, solver, nfe)}.json"

    def journal(self, method: str, solver: str, nfe: int) -> Path:
        return self.shared(method, solver, nfe).with_suffix(".journal")

    def derivatives(self, solver: str, steps: int, samples: int) -> Path:
        return self.learned / "derivatives" / f"{solver}-{steps}-steps-{samples}-samples.journal"

    @property
    def trials(self) -> Path:
        """The database of the blackbox search."""
        return self.learned / "blackbox" / "optuna.db"

    def labels(self, split: str, solver: str, nfe: int) -> Path:
        """split: train or test, with the corrections behind it that were searched as well."""
        return self.learned / "labels" / split / served(split, solver, nfe)

    def predictor(self, name: str, solver: str, nfe: int) -> Path:
        return self.learned / "predictors" / name.removesuffix(ALL) / served(name, solver, nfe)

    def quantizer(self, name: str, digest: str) -> Path:
        return self.data / "quantizers" / f"{name}-{digest}"

    def latents(self, digest: str) -> Path:
        """What the autoencoder makes of the images that `digest` stands for."""
        return self.data / "latents" / f"{digest}.safetensors"

    def pruned(self, solver: str, nfe: int) -> Path:
        return self.data / "pruned" / f"pruned-{served('', solver, nfe)}.json"

    @property
    def evaluation(self) -> Path:
        return self.logs

    @property
    def runs(self) -> Path:
        """The run files of the comparison."""
        return self.logs / "runs"

    @property
    def config(self) -> Path:
        return self.logs / "config.yml"

    def samples(self, schedule: str, solver: str, nfe: int) -> Path:
        return self.logs / "samples" / self.student / f"{schedule}-{served('', solver, nfe)}"

    def tensorboard(self, *names: str) -> Path:
        return Path(self.logs, "tensorboard", *names)

    def curves(self, job: str, solver: str, nfe: int) -> Path:
        """Where TensorBoard finds what is learned by `job`."""
        return self.tensorboard(self.student, job, served(job, solver, nfe))


def served(result: str, solver: str, nfe: int) -> str:
    """What a file of `result` is called: it is for one NFE, or, with `ALL` behind the name, for several."""
    return f"{solver}{ALL}" if result.endswith(ALL) else f"{solver}-nfe{nfe}"


def stem(sampler: str) -> str:
    """A sampler (solver and student) in the name of a file."""
    return sampler.replace(", ", "-")


def run_file(sampler: str, nfe: int, schedule: str) -> str:
    """A run of the comparison, under `runs`."""
    return f"{stem(sampler)}-nfe{nfe}-{schedule}.safetensors"


def run_part(run: str, first: int) -> str:
    """The part of a run that begins with the sample `first`, under `runs`."""
    return f"{PARTS}/{Path(run).stem}-{first:06d}.safetensors"


def checkpoint_file(result: Path, key: str = "") -> Path:
    """The checkpoint of the training that makes `result`; `key`: of what it is learned from."""
    return result.with_name(".".join(part for part in (result.name, key, "training") if part))


def shard_file(number: int) -> str:
    """The samples of a teacher."""
    return f"shard-{number:05d}.safetensors"


def shard_number(file: str) -> int:
    """The inverse of `shard_file`."""
    return int(Path(file).stem.removeprefix("shard-"))


def receipt_file(shard: str) -> str:
    """What is said of a shard that the manifest does not list yet."""
    return Path(shard).with_suffix(".json").name


def shard_of(receipt: str) -> str:
    """The inverse of `receipt_file`."""
    return Path(receipt).with_suffix(".safetensors").name


def label_file(number: int) -> str:
    """The labels of a batch."""
    return f"part-{number:05d}.safetensors"


def image_file(number: int, digits: int = 5) -> str:
    """A picture in a folder of images."""
    return f"{IMAGES}/{number:0{digits}d}.png"


def predictor_folder(nfe: int) -> str:
    """The folder of one of several predictors in a schedule for diffusers."""
    return f"nfe{nfe}"
