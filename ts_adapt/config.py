"""One experiment as a dataclass: the options of every room, with their limits, and where its things are kept.

Every option has a default, so a config names what differs.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from ts_adapt.assembly import NONE, ModelOptions, build_cachers, build_quantizer, solver_name
from ts_adapt.evaluation.benchmark import EvaluateOptions
from ts_adapt.grids.space import CORRECTIONS
from ts_adapt.interfaces import TsAdaptError, unknown
from ts_adapt.predictors.store import MAX_HIDDEN, MAX_WIDTH, PREDICTORS
from ts_adapt.predictors.training import TrainOptions
from ts_adapt.schedule_file import MAX_STEPS
from ts_adapt.search.blackbox import BlackboxOptions
from ts_adapt.search.optimized import OptimizedOptions
from ts_adapt.search.per_sample import PerSampleOptions
from ts_adapt.search.static import StaticOptions
from ts_adapt.teacher.store import MAX_SHARD, TEST_START

MANY, SMALL, SEED = 10_000_000, 1e-9, 2**32 - 1
LIMITS: dict[str, tuple[float, float]] = {
    "guidance": (-1000, 1000),
    "nfe": (1, MAX_STEPS),
    "static_samples": (1, TEST_START // 2),
    "label_samples": (2, MANY),
    "oracle_samples": (2, MANY),
    "label_batch": (1, MANY),
    "teacher.nfe": (1, MAX_STEPS),
    "teacher.train_samples": (1, TEST_START),
    "teacher.test_samples": (1, MANY),
    "teacher.batch_size": (1, MANY),
    "teacher.seed": (0, SEED),
    "teacher.shard_size": (1, MAX_SHARD),
    "static.iterations": (1, MANY),
    "static.starts": (1, 1000),
    "static.tolerance": (0, 1),
    "static.batch_size": (1, MANY),
    "static.lr": (SMALL, 1000),
    "static.smoothing": (SMALL, 1000),
    "static.clip": (SMALL, math.inf),
    "static.ema": (0, 0.999999),
    "static.validate_every": (1, MANY),
    "static.seed": (0, SEED),
    "per_sample.iterations": (1, MANY),
    "per_sample.lr": (SMALL, 1000),
    "per_sample.random_starts": (0, 1000),
    "per_sample.candidates": (1, 10_000),
    "per_sample.spread": (0, 1000),
    "per_sample.clip": (SMALL, math.inf),
    "per_sample.seed": (0, SEED),
    "blackbox.trials": (1, MANY),
    "blackbox.radius": (SMALL, 1000),
    "blackbox.seed": (0, SEED),
    "optimized.samples": (1, MANY),
    "optimized.places": (1, MAX_STEPS),
    "train.epochs": (1, MANY),
    "train.samples": (10, MANY),
    "train.label_epochs": (1, MANY),
    "train.batch_size": (1, MANY),
    "train.lr": (SMALL, 1000),
    "train.label_lr": (SMALL, 1000),
    "train.weight_decay": (0, 1000),
    "train.ema": (0, 0.999999),
    "train.patience": (1, MANY),
    "train.validate_every": (1, MANY),
    "train.width": (1, MAX_WIDTH),
    "train.hidden": (1, MAX_HIDDEN),
    "train.seed": (0, SEED),
    "calibration.noises": (1, TEST_START),
    "calibration.nfe": (1, MAX_STEPS),
    "calibration.count": (1, MANY),
    "evaluate.samples": (2, MANY),
    "evaluate.batch_size": (1, MANY),
}
"""The least and the greatest value of every option that is a number (of `nfe`: of each of its numbers)."""


@dataclass
class TeacherOptions:
    """The fine solve that schedules are learned from. Test noises are never used in learning."""

    solver: str = "unipc-3"
    grid: str = "log_snr"
    """A fixed grid's name."""
    nfe: int = 40
    """Evaluations of the fine solve."""
    train_samples: int = 1024
    test_samples: int = 2000
    batch_size: int = 64
    seed: int = 0
    """Of the noises; sample i depends on it and on i only."""
    shard_size: int = 256
    """Samples a file."""
    trajectory: bool = False
    """Keep every state of the solve, not only its end."""
    label: int | None = None
    """One class for all samples of a class-conditional model; None: drawn for each sample."""
    prompts: str | None = None
    """A text file with one prompt a line, for text-conditional models."""


@dataclass
class CalibrationOptions:
    """The calls of the network that quantizers are calibrated on: along the teacher's grid, from training noises."""

    noises: int = 32
    """Training noises that are solved from."""
    nfe: int = 20
    """Evaluations of these solves."""
    count: int = 256
    """Samples of the calibration set, of noises * nfe; which, the quantizer says, or its name: minmax-w8a8@normal."""


@dataclass
class Config:
    """One experiment. `name` is the folder under `data_root` and `log_root`."""

    name: str = "fashion"
    """The folder under data_root and log_root."""
    model: ModelOptions = field(default_factory=ModelOptions)
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1: none."""
    solvers: list[str] = field(default_factory=lambda: ["unipc-3"])
    """Names such as ddim, dpmpp-2m, unipc-3, deis-2, ipndm-3, ddim+corrector; unipc, dpmpp, deis and ipndm alone are
    of the order that diffusers takes."""
    nfe: list[int] = field(default_factory=lambda: [5])
    """Numbers of evaluations."""
    cachers: list[str] = field(default_factory=lambda: [NONE])
    """What evaluate attaches to the network: none, deepcache-3, deepcache-5-branch2, tgate-5, tgate-5+deepcache-2."""
    quantizers: list[str] = field(default_factory=lambda: [NONE])
    """How evaluate quantizes it: none, hqq4, minmax-w8a8, tdq-w4a8, tinydm-w8a8, vqdm4, torchao-int8."""
    distance: str = "features"
    """What is minimised: features (the embedded network), l2, or lpips."""
    rescale_published: bool = False
    """Fit published tables (AYS) to the model's sigma range."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    static_samples: int = 128
    """Training samples of the static search, and as many more for its validation."""
    label_samples: int = 512
    """Training samples with oracle labels."""
    oracle_samples: int = 512
    """Test samples with oracle grids."""
    label_batch: int = 128
    """Samples searched side by side."""
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    static: StaticOptions = field(default_factory=StaticOptions)
    per_sample: PerSampleOptions = field(default_factory=PerSampleOptions)
    blackbox: BlackboxOptions = field(default_factory=BlackboxOptions)
    optimized: OptimizedOptions = field(default_factory=OptimizedOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    data_root: str = "train_data"
    """Where what is generated and learned is kept."""
    log_root: str = "logs"
    """Where results, samples and TensorBoard files are kept."""

    def __post_init__(self) -> None:
        if isinstance(self.solvers, list):
            self.solvers = [solver_name(name) if isinstance(name, str) else name for name in self.solvers]

    def made_with(self, result: str) -> dict[str, Any]:
        """The options that `result` depends on beside teacher, distance and static grid, nested as in the YAML file.

        result  static (with corrections or without), per-sample, blackbox, dmn, gits, oss, one-shot or recursive
        """
        if result.startswith("static"):
            options = ["static_samples", "rescale_published", "static"]
        elif result == "blackbox":
            options = ["static_samples", "rescale_published", "blackbox"]
        elif result == "per-sample":
            options = ["label_batch", "per_sample"]
        elif result in PREDICTORS:
            options = ["train"] if self.train.loss == "end_to_end" else ["label_samples", "train"]
        else:
            options = [] if result == "dmn" else ["optimized"]
        found = {name: value for name, value in asdict(self).items() if name in options}
        found.get("blackbox", {}).pop("storage", None)
        found.get("static", {}).pop("corrections", None)  # the result's name says them
        return found

    @property
    def static_name(self) -> str:
        """What the shared grid is called that the options of `static` lead to: static, with +CORRECTION behind it."""
        return "".join(["static", *(f"+{name}" for name in CORRECTIONS if name in self.static.corrections)])

    def validate(self) -> None:
        """TsAdaptError naming the first option whose value cannot be worked with."""
        for option, default in vars(Config()).items():
            if is_dataclass(default) and not isinstance(getattr(self, option), type(default)):
                raise TsAdaptError(
                    f"option {option} is {getattr(self, option)!r}; it is a group of options, "
                    f"give some of it, like {option}.{next(iter(vars(default)))}"
                )
        for option in ("name", "distance", "data_root", "log_root"):
            if not isinstance(getattr(self, option), str):
                raise TsAdaptError(f"option {option} is {getattr(self, option)!r}; give a text")
        if self.name in ("", ".", "..") or re.search(r"[/\\\0]", self.name):
            raise TsAdaptError(f"option name is {self.name!r}; give one folder name, without / or ..")
        for option in ("solvers", "nfe", "cachers", "quantizers"):
            values = getattr(self, option)
            if not isinstance(values, list) or not values:
                raise TsAdaptError(f"option {option} is {values!r}; give a list of at least one")
            twice = [value for place, value in enumerate(values) if value in values[:place]]
            if twice:
                raise TsAdaptError(f"option {option} lists {twice[0]!r} twice; leave one of them out")
        for cacher in self.cachers:
            build_cachers(cacher)
        for quantizer in self.quantizers:
            build_quantizer(quantizer)
        for option, (low, high) in LIMITS.items():
            value: Any = self
            for part in option.split("."):
                value = getattr(value, part)
            for number in value if isinstance(value, list) else [value]:
                _check_limits(option, number, low, high)
        foreign = [name for name in [*self.static.corrections, *self.train.corrections] if name not in CORRECTIONS]
        if foreign:
            raise unknown("correction", str(foreign[0]), CORRECTIONS)


def _check_limits(option: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        wanted = f"at least {low:g}" if isinstance(value, int | float) and value < low else f"a number from {low:g} on"
        ceiling = "" if high == math.inf else f", at most {high if isinstance(high, int) else format(high, 'g')}"
        raise TsAdaptError(f"option {option} is {value}; give {wanted}{ceiling}")


@dataclass(frozen=True)
class Workspace:
    """Where an experiment keeps its things."""

    data: Path
    logs: Path

    @classmethod
    def of(cls, config: Config) -> Workspace:
        return cls(Path(config.data_root) / config.name, Path(config.log_root) / config.name)

    def teacher(self, split: str) -> Path:
        return self.data / "teacher" / split

    def shared(self, method: str, solver: str, nfe: int) -> Path:
        return self.data / method / f"{solver}-nfe{nfe}.json"

    def labels(self, split: str, solver: str, nfe: int) -> Path:
        return self.data / "labels" / split / f"{solver}-nfe{nfe}"

    def predictor(self, kind: str, solver: str, nfe: int) -> Path:
        return self.data / "predictors" / kind / f"{solver}-nfe{nfe}"

    def quantizer(self, name: str, digest: str) -> Path:
        return self.data / "quantizers" / f"{name}-{digest}"

    def tensorboard(self, job: str, solver: str, nfe: int) -> Path:
        return self.logs / "tensorboard" / job / f"{solver}-nfe{nfe}"

    @property
    def evaluation(self) -> Path:
        return self.logs


def types_of(kind: type, prefix: str = "") -> dict[str, str]:
    """The dotted name of every option of a dataclass, those of groups included, and its type as it is written."""
    found = {}
    for option in fields(kind):
        found[prefix + option.name] = str(option.type)
        group: Any = option.default_factory
        if isinstance(group, type) and is_dataclass(group):
            found |= types_of(group, f"{prefix}{option.name}.")
    return found
