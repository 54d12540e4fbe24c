"""One experiment as a dataclass: the options of every room, checked (`options`).

Every option has a default, so a config names what differs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from ts_adapt import pruning
from ts_adapt.assembly import (
    NONE,
    ModelOptions,
    StudentOptions,
    build_cachers,
    build_quantizer,
    build_solver,
    solver_name,
)
from ts_adapt.distances import DISTANCES
from ts_adapt.dual_encoders import ZOO, same
from ts_adapt.errors import TsAdaptError, unknown
from ts_adapt.evaluation.records import EvaluateOptions, sampler_name
from ts_adapt.interfaces import DERIVATIVE_WIDTH, DERIVATIVES
from ts_adapt.noise import ContinuousVP
from ts_adapt.options import (
    MANY,
    SMALL,
    Between,
    Count,
    Decay,
    Evaluations,
    OneOf,
    PathText,
    Positive,
    Seed,
    check_options,
)
from ts_adapt.predictors.phases import USED_BY_LOSS, TrainOptions
from ts_adapt.predictors.store import PREDICTOR_NAMES
from ts_adapt.pruning import PruneOptions
from ts_adapt.schedules.name import ORACLE, PREDICTOR, SHARED, SHARED_NAMES, fixed_name, parse
from ts_adapt.search.blackbox import BlackboxOptions
from ts_adapt.search.objective import AUTO
from ts_adapt.search.optimized import OptimizedOptions
from ts_adapt.search.per_sample import PerSampleOptions
from ts_adapt.search.static import BY_GRADIENT
from ts_adapt.search.static_options import USED_BY_METHOD, StaticOptions
from ts_adapt.storage.files import differing
from ts_adapt.storage.layout import Workspace, stem
from ts_adapt.teacher.manifest import MAX_SHARD

MOST_VALIDATION = 128
"""Samples that validate a static grid where nothing else is said, at most."""
USED: dict[str, tuple[str, Mapping[str, tuple[str, ...]]]] = {
    "static": ("method", USED_BY_METHOD),
    "train": ("loss", USED_BY_LOSS),
}
"""Of a group of options the one that chooses, and the values of it under which others are used; the rest always is."""
OPEN = ("static_validation", "validation")
"""What is recorded as it was used, where the option itself may be None."""


def used(group: str, options: Mapping[str, Any], chosen: Any) -> dict[str, Any]:
    """The `options` of a `group` that are used where the one that chooses is `chosen`."""
    under = USED[group][1]
    return {name: value for name, value in options.items() if name not in under or chosen in under[name]}


def other_options(kept: Mapping[str, Any], now: Mapping[str, Any], usual: Mapping[str, Any]) -> list[str]:
    """What of `now`, a record of `Config.made_with`, is another in one that was `kept`, as `differing` says it.

    usual  such a record where options are left open that may be: what a None stands for that was kept of them
    """

    def filled(record: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
        return {**record, **{name: usual[name] for name in OPEN if name in usual and record.get(name, 0) is None}}

    before, after = filled(kept, usual), dict(now)
    for group, (chooser, _) in USED.items():
        if isinstance(former := before.get(group), Mapping) and group in after:
            before[group], after[group] = filled(former, usual[group]), used(group, now[group], former.get(chooser))
    return differing(before, after)


@dataclass
class TeacherOptions:
    """The fine solve that schedules are learned from. Test noises are never used in learning."""

    solver: str = "unipc-2"
    grid: str = "log_snr"
    """A fixed grid's name."""
    nfe: Evaluations = 40
    """Evaluations of the fine solve."""
    test_nfe: Evaluations | None = None
    """Those of test samples, by which schedules are judged; None: the same."""
    train_samples: Count = 1024
    test_samples: Count = 2000
    batch_size: Count = 64
    seed: Seed = 0
    """Of the noises; sample i depends on it and on i only."""
    shard_size: Annotated[int, Between(1, MAX_SHARD)] = 256
    """Samples a file."""
    trajectory: bool = False
    """Keep every state of the solve, not only its end."""
    label: int | None = None
    """One class for all samples of a class-conditional model; None: drawn for each sample."""
    prompts: PathText | None = None
    """A file of prompts, for text-conditional models: one a line, PartiPrompts' TSV, or COCO's captions in JSON."""
    test_prompts: PathText | None = None
    """Such a file for the test noises; None: the same."""

    def __post_init__(self) -> None:
        self.solver = solver_name(self.solver) if isinstance(self.solver, str) else self.solver

    def nfe_of(self, split: str) -> int:
        """The evaluations of a solve of the split, train or test."""
        return self.test_nfe if split == "test" and self.test_nfe is not None else self.nfe

    def prompts_of(self, split: str) -> str | None:
        """The file of the prompts of the split, train or test."""
        return self.test_prompts if split == "test" and self.test_prompts is not None else self.prompts


@dataclass
class CalibrationOptions:
    """The calls of the network that quantizers are calibrated on: along the teacher's grid, from training noises."""

    noises: Count = 32
    """Training noises that are solved from."""
    nfe: Evaluations = 20
    """Evaluations of these solves."""
    count: Count = 256
    """Samples of the calibration set, of noises * nfe; which, the quantizer says, or its name: minmax-w8a8@normal."""


@dataclass
class QATOptions:
    """Quantization-aware training, of quantizers with +qat behind their name: `ts-adapt quantize`."""

    steps: Count = 2000
    batch_size: Count = 64
    """Images a step; of each process, where several train."""
    lr: Positive = 1e-4
    """Of Adam, at its highest."""
    warm_up: Annotated[int, Between(0, MANY)] = 0
    """Steps over which the rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls: cosine and linear to 0."""
    ema: Decay = 0.0
    """Decay of the moving average of the weights, which is kept; 0: the last weights are."""
    loss: Literal["diffusion", "teacher"] = "diffusion"
    """diffusion (as the network was trained), or teacher (what the network in full precision says)."""
    norm: Literal["l2", "l1"] = "l2"
    """Of the loss: squares, or absolute values."""
    dropout: Annotated[float, Between(0, 1)] = 0.1
    """Share of the samples that are shown without their condition, of a model that can be guided."""
    data: PathText = "fashion"
    """fashion (the embedded model's training images), teacher (the teacher's training samples, with their conditions),
    or a folder of images of the model's size; metadata.csv in it says their classes or texts."""
    images: Count = 10_000
    """Of the data, the first ones, at most."""
    checkpoint_every: Count = 200
    """Steps; a training that was interrupted goes on from there."""
    seed: Seed = 0


@dataclass
class DistributionOptions:
    """The real images that the losses distribution and adversarial of --static and --train learn from; those that judge
    are others."""

    data: PathText | None = None
    """A folder of images of the model's size; None: the second half of the embedded test images, as the first may
    judge, and of an analytic model samples of its own."""
    images: Annotated[int, Between(2, MANY)] = 5000
    """At most; of a folder the first ones."""


@dataclass
class Config:
    """One experiment. `name` is the folder under `data_root` and `log_root`."""

    name: str = "fashion"
    """The folder under data_root and log_root."""
    model: ModelOptions = field(default_factory=ModelOptions)
    guidance: Annotated[float, Between(-1000, 1000)] | list[Positive] = 1.0
    """Scale of classifier-free guidance; 1: none; [1.5, 8]: each sample has its own between the two, log-uniform, and
    predictors are told it."""
    solvers: list[str] = field(default_factory=lambda: ["unipc-3"])
    """Names such as ddim, dpmpp-2m, unipc-3, deis-2, ipndm-3, ddim+corrector; unipc, dpmpp, deis and ipndm alone are
    of the order that diffusers takes."""
    nfe: list[Evaluations] = field(default_factory=lambda: [5])
    """Numbers of evaluations."""
    pruned: list[PathText] = field(default_factory=lambda: [NONE])
    """What evaluate leaves out of the network: none, files that `ts-adapt prune` wrote."""
    cachers: list[str] = field(default_factory=lambda: [NONE])
    """What evaluate attaches to the network: none, deepcache-3, deepcache-5-branch2, tgate-5, tgate-5+deepcache-2;
    to a transformer firstblock-.1, magcache-.06, seacache-.25, taylorseer-3, pab-2 or fastercache-2."""
    quantizers: list[str] = field(default_factory=lambda: [NONE])
    """How evaluate quantizes it: none, hqq4, minmax-w8a8, tdq-w4a8, tinydm-w8a8, vqdm4, torchao-int8, bf16, fp16."""
    learn: list[str] | None = None
    """What `learn` makes, of static, static+shift+scale+coefficients, blackbox, dmn, gits, oss, klub, oracle, one-shot,
    recursive, recursive-all; None: static, the same with static.corrections, and recursive (not of pipelines that can
    be told only their loop's times); []: nothing."""
    distance: Annotated[str, OneOf(DISTANCES)] | None = None
    """What is minimised: features (the embedded network), l2, or lpips; None: features where they fit, else l2."""
    rescale_published: bool = False
    """Fit published tables (AYS) to the model's sigma range."""
    derivative: Annotated[str, OneOf((AUTO, *DERIVATIVES))] = AUTO
    """How searches and trainings take the derivative in time: exact, slow (without the fast components of the network's
    time embedding), secant; auto: the one that agrees best with differences of the distance."""
    derivative_width: Annotated[float, Between(SMALL, 1)] = DERIVATIVE_WIDTH
    """Of slow and secant: the share of all times over which the derivative is a mean; .04 are 40 of 1000 timesteps."""
    caption: PathText = ZOO
    """The dual encoder that --static.caption and --train.caption please, and which may not judge: zoo, the embedded
    one, which knows emoji, or a CLIP model of transformers, a folder or hub id."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    static_samples: Annotated[int, Between(1, MANY // 2)] = 768
    """Training samples of the static search."""
    static_validation: Count | None = None
    """How many more validate it; None: as many, at most 128."""
    label_samples: Annotated[int, Between(2, MANY)] = 512
    """Training samples with oracle labels."""
    oracle_samples: Annotated[int, Between(2, MANY)] = 512
    """Test samples with oracle grids."""
    label_batch: Count = 128
    """Samples searched side by side."""
    threads: Annotated[int, Between(0, 1024)] = 0
    """CPU threads of a process, on which the last bits depend; 0: as the environment says, under a launcher 1."""
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    static: StaticOptions = field(default_factory=StaticOptions)
    distribution: DistributionOptions = field(default_factory=DistributionOptions)
    per_sample: PerSampleOptions = field(default_factory=PerSampleOptions)
    blackbox: BlackboxOptions = field(default_factory=BlackboxOptions)
    optimized: OptimizedOptions = field(default_factory=OptimizedOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    prune: PruneOptions = field(default_factory=PruneOptions)
    student: StudentOptions = field(default_factory=StudentOptions)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    qat: QATOptions = field(default_factory=QATOptions)
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    data_root: PathText = "train_data"
    """Where what is generated and learned is kept."""
    log_root: PathText = "logs"
    """Where results, samples and TensorBoard files are kept."""
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=lambda: ["tensorboard"])
    """Where scalars and figures go: tensorboard always, and wandb where it is listed."""

    def __post_init__(self) -> None:
        if isinstance(self.solvers, list):
            self.solvers = [solver_name(name) if isinstance(name, str) else name for name in self.solvers]
        if isinstance(self.guidance, list) and len(self.guidance) == 2 and self.guidance[0] == self.guidance[1]:
            self.guidance = self.guidance[0]

    @property
    def students(self) -> list[StudentOptions]:
        """The networks that evaluate compares."""
        return [
            StudentOptions(pruned, cacher, quantizer)
            for pruned, quantizer, cacher in product(self.pruned, self.quantizers, self.cachers)
        ]

    @property
    def static_validating(self) -> int:
        """How many training samples behind those of the static search validate it."""
        given = self.static_validation
        return min(self.static_samples, MOST_VALIDATION) if given is None else given

    @property
    def derivative_options(self) -> list[str]:
        """The names of the options that the derivative in time depends on."""
        return ["derivative"] if self.derivative == "exact" else ["derivative", "derivative_width"]

    def made_with(self, result: str) -> dict[str, Any]:
        """The options that `result` depends on beside teacher, distance and static grid, nested as in the YAML file.

        Those that its method uses, and what was used where an option leaves it open.

        result  static (with corrections or without), per-sample, blackbox, dmn, gits, oss, klub, one-shot or recursive
        """
        if result.startswith("static"):
            options = ["static_samples", "static_validation", "rescale_published", "static"]
            options += self.derivative_options if self.static.method in BY_GRADIENT else []
        elif result == "blackbox":
            options = ["static_samples", "static_validation", "rescale_published", "blackbox"]
        elif result == "per-sample":
            options = ["label_batch", "per_sample", *self.derivative_options]
        elif result in PREDICTOR_NAMES:
            options = ["train"]
            options += self.derivative_options if self.train.loss != "labels" else []
            options += ["label_samples"] if self.train.loss != "end_to_end" else []
        else:
            options = [] if result == "dmn" else ["optimized"]
        if self.student.name:
            options.append("student")
            quantizing = build_quantizer(self.student.quantizer)
            options += ["calibration"] if quantizing is not None and quantizing.needs_calls else []
            options += ["qat"] if quantizing is not None and quantizing.method.needs_training else []
        found = {name: value for name, value in asdict(self).items() if name in options}
        if "student" in found and found["student"].pop("pruned") != NONE:
            found["student"]["pruned"] = sorted(pruning.read(self.student.pruned))
        if "static_validation" in found:
            found["static_validation"] = self.static_validating
        if "train" in found:
            found["train"] = {**self.train.record, "validation": self.train.validating}
        for group, (chooser, _) in USED.items():
            if group in found:
                found[group] = used(group, found[group], found[group][chooser])
        if not self.per_sample.random_starts:
            for option in ("candidates", "spread", "seed"):
                found.get("per_sample", {}).pop(option, None)
        found.get("blackbox", {}).pop("storage", None)
        found.get("qat", {}).pop("checkpoint_every", None)
        for group in ("static", "per_sample"):
            found.get(group, {}).pop("corrections", None)  # the result's name says them
        for group in ("static", "train"):
            if group in found:
                for loss in ("distribution", "adversarial"):
                    weight = found[group].pop(loss)
                    found[loss] = {"weight": weight, **asdict(self.distribution)} if weight else None
                weight = found[group].pop("caption")
                found["caption"] = {"weight": weight, "by": self.caption} if weight else None
        return found

    @property
    def shown(self) -> dict[str, Any]:
        """Every option, for others to see: without `blackbox.storage`, a URL that may hold a password."""
        found = asdict(self)
        del found["blackbox"]["storage"]
        return found

    @property
    def workspace(self) -> Workspace:
        """Where the experiment keeps its things."""
        return Workspace(Path(self.data_root) / self.name, Path(self.log_root) / self.name, self.student.name)

    def validate(self) -> None:
        """TsAdaptError naming the first option whose value cannot be worked with."""
        check_options(self)
        for option in ("data_root", "log_root"):
            if "://" in getattr(self, option):
                raise TsAdaptError(f"option {option} is {getattr(self, option)}; give a folder, URLs have no locks")
        if self.name in ("", ".", "..") or re.search(r"[/\\\x00-\x1f]", self.name):
            raise TsAdaptError(f"option name is {self.name!r}; give one folder name, without /, .. or line breaks")
        if isinstance(self.guidance, list) and (len(self.guidance) != 2 or self.guidance[0] > self.guidance[1]):
            raise TsAdaptError(
                f"option guidance is {self.guidance}; give one scale, or the two ends of a range, such as [1.5, 8]"
            )
        for name in map(parse, self.learn or []):
            if name.kind not in (SHARED, ORACLE, PREDICTOR) or name.student:
                raise unknown("schedule to learn", str(name), [*SHARED_NAMES, "oracle", *PREDICTOR_NAMES])
        for option in ("solvers", "nfe", "pruned", "cachers", "quantizers", "trackers"):
            values = getattr(self, option)
            if not values:
                raise TsAdaptError(f"option {option} is {values!r}; give a list of at least one")
            twice = [value for place, value in enumerate(values) if value in values[:place]]
            if twice:
                raise TsAdaptError(f"option {option} lists {twice[0]!r} twice; leave one of them out")
        for solver in (*self.solvers, self.teacher.solver):
            build_solver(solver, ContinuousVP())
        for grid in (self.teacher.grid, *(self.evaluate.grids or ())):
            fixed_name(grid)
        for cacher in (*self.cachers, self.student.cacher):
            build_cachers(cacher)
        for quantizer in (*self.quantizers, self.student.quantizer):
            build_quantizer(quantizer)
        self._check_pruned()
        if any(options.distribution or options.adversarial for options in (self.static, self.train)):
            self._check_images()
        if self.static.caption or self.train.caption:
            self._check_captions()

    def _check_pruned(self) -> None:
        """TsAdaptError for a file that no network can be called by, and for two of which it would be called alike."""
        files = dict[str, str]()
        for path in [*self.pruned, self.student.pruned]:
            other = files.setdefault(StudentOptions(path).name, path)
            if Path(other).resolve() != Path(path).resolve():
                raise TsAdaptError(
                    f"options pruned and student.pruned name {other} and {path}, and networks are called as these "
                    "files are; rename one of them"
                )
        samplers = [stem(sampler_name(solver, each.parts)) for solver in self.solvers for each in self.students]
        if len({*samplers}) < len(samplers):
            twice = next(name for place, name in enumerate(samplers) if name in samplers[:place])
            raise TsAdaptError(
                f"two networks of the comparison would be called {twice}, by the files of option pruned; rename one, "
                "or leave out what is named twice"
            )

    def _check_images(self) -> None:
        """TsAdaptError where the real images that are learned from also judge."""
        data, reference = self.distribution.data, self.evaluate.reference
        if data is not None and reference is not None:
            one, other = Path(data).resolve(), Path(reference).resolve()
            if one.is_relative_to(other) or other.is_relative_to(one):
                raise TsAdaptError(
                    f"options distribution.data and evaluate.reference are {data} and {reference}: images that are "
                    "learned from may not judge; give folders apart from one another"
                )

    def _check_captions(self) -> None:
        """TsAdaptError where there are none, and where the network that is learned by also judges."""
        if self.teacher.prompts is None:
            raise TsAdaptError("a caption loss asks images for their prompts; give teacher.prompts, or leave it out")
        if self.evaluate.clip is not None and same(self.caption, self.evaluate.clip):
            raise TsAdaptError(
                f"options caption and evaluate.clip are both {self.caption}: who is learned by may not judge; name "
                "another network in one of them, or set evaluate.clip to null"
            )
