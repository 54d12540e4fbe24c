"""The comparison: schedules x solvers x NFE x cachers x quantizers on the same test noises, against the same teacher,
who samples in full precision.

An `Entry` is one schedule to be measured, a `Run` (`runs`) what it gave, a `Row` its scores. What compares is of one
sampler (solver, cacher, quantizer) and NFE. A Frechet distance depends on the number of samples: rows of different
`samples` do not compare, and everything is also scored on the oracle's subset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ts_adapt.assembly import NONE
from ts_adapt.evaluation.metrics import FeatureStatistics, bootstrap_interval, frechet, ratio, ratio_interval
from ts_adapt.interfaces import StepPolicy, TimeGrid
from ts_adapt.predictors.store import PREDICTORS
from ts_adapt.schedules.name import OF_STUDENT, parse

if TYPE_CHECKING:
    from ts_adapt.evaluation.quality import Quality
    from ts_adapt.evaluation.runs import Run

STATIC = "static"
"""The schedule that all others are set against: one learned grid for all samples, nothing but its times learned."""


@dataclass
class EvaluateOptions:
    """What is measured."""

    samples: int = 2000
    """Test samples of every schedule but the oracle, which is measured on its labels' samples."""
    batch_size: int = 64
    features: str = "zoo"
    """The extractor of the Frechet distance: zoo (offline), inception, or pixels (the samples as they are)."""
    inception: str | None = None
    """A folder with clean-fid's Inception weights; None: downloaded."""
    reference: str | None = None
    """A folder of real images, of the model's size but for inception; None: the embedded statistics of the zoo's
    training images."""
    grids: list[str] | None = None
    """Fixed grids to compare, with +native or +rounded behind a name for other forms of it; None: all that fit the
    model, between the same ends."""
    schedules: list[str] = field(default_factory=list)
    """What to compare as well, for the solver and every NFE that it was learned for: schedule files, schedules of the
    zoo by name, folders or hub ids of a LearnedScheduler."""
    clip: str | None = None
    """A CLIP model of transformers, a folder or hub id, for the CLIP score of prompts; None: no score."""


def sampler_name(solver: str, cacher: str, quantizer: str) -> str:
    """The solver, and behind it cacher and quantizer where there are any: `ddim`, `ddim, deepcache-2, hqq4`."""
    return ", ".join([solver, *(name for name in (cacher, quantizer) if name != NONE)])


def stem(sampler: str) -> str:
    """A sampler in the name of a file."""
    return sampler.replace(", ", "-")


class Sampled:
    """What a thing of the comparison is sampled with."""

    solver: str
    nfe: int
    schedule: str
    cacher: str
    quantizer: str

    @property
    def sampler(self) -> str:
        """See `sampler_name`."""
        return sampler_name(self.solver, self.cacher, self.quantizer)

    @property
    def file(self) -> str:
        """The name of its run file."""
        return f"{stem(self.sampler)}-nfe{self.nfe}-{self.schedule}.safetensors"


@dataclass(frozen=True)
class Entry(Sampled):
    """One schedule to be measured. `fingerprint` identifies what it is (see `fingerprint`); `samples` how many rows."""

    solver: str
    nfe: int
    schedule: str
    kind: str
    policy: StepPolicy | TimeGrid
    fingerprint: str
    samples: int
    cacher: str = NONE
    quantizer: str = NONE


@dataclass(frozen=True)
class Row(Sampled):
    """A line of results.csv.

    distance         the mean paired distance to the teacher, with its 95 % interval
    distance_median  of the same distances: what a few samples that end in another mode do not move
    wins             the share of the samples on which it is nearer to the teacher than the static grid, ties by half
    bits             of a quantized weight, with all that is kept of it; without a quantizer those of its precision
    weight_bytes     of the network
    flops            of one image
    peak_memory      bytes that sampling COST_IMAGES (`runs`) images at once needs beyond the weights
    kid ...          see `quality`

    None is what does not apply: wins without a static grid beside it, weights of a model without a network, ..., and
    what an earlier version did not measure.
    """

    model: str
    solver: str
    nfe: int
    schedule: str
    kind: str
    samples: int
    fid_data: float
    fid_teacher: float
    distance: float
    distance_low: float
    distance_high: float
    seconds_per_image: float
    seed: int
    distance_median: float | None = None
    wins: float | None = None
    cacher: str = NONE
    quantizer: str = NONE
    bits: float | None = None
    weight_bytes: int | None = None
    flops: float | None = None
    peak_memory: int | None = None
    kid: float | None = None
    inception_score: float | None = None
    sfid: float | None = None
    precision: float | None = None
    recall: float | None = None
    clip_score: float | None = None


def fingerprint(*parts: object) -> str:
    """A hash of tensors, state dicts and plain values."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, TimeGrid):
            part = [part.times, part.model_times, part.output_scale, part.coefficients]
        if isinstance(part, dict):
            part = [x for key in sorted(part) for x in (key, part[key])]
        if isinstance(part, list | tuple):
            digest.update(fingerprint(*part).encode())
        elif isinstance(part, Tensor):
            digest.update(str((part.dtype, tuple(part.shape))).encode())
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


def share_of_wins(distance: Tensor, other: Tensor) -> float:
    """The share of the samples on which `distance` `(n,)` is below `other` `(n,)`; a tie counts half."""
    return float(((distance < other).double() + 0.5 * (distance == other).double()).mean())


def score(
    entry: Entry,
    run: Run,
    samples: int,
    data: FeatureStatistics,
    teacher_features: Tensor,
    model: str,
    seed: int,
    static: Run | None = None,
    quality: Quality | None = None,
) -> Row:
    """The table's row of `entry` on its first `samples` test samples; `static` is what the static grid gave on them."""
    features, distance = run.features[:samples], run.distance[:samples]
    low, high = bootstrap_interval(distance)
    student = FeatureStatistics.of(features)
    return Row(
        model=model,
        solver=entry.solver,
        nfe=entry.nfe,
        schedule=entry.schedule,
        kind=entry.kind,
        samples=len(distance),
        fid_data=frechet(student, data),
        fid_teacher=frechet(student, FeatureStatistics.of(teacher_features[:samples])),
        distance=float(distance.double().mean()),
        distance_low=low,
        distance_high=high,
        seconds_per_image=run.seconds_per_image,
        seed=seed,
        distance_median=median(distance.double().tolist()),
        wins=None if static is None else share_of_wins(distance, static.distance[:samples]),
        cacher=entry.cacher,
        quantizer=entry.quantizer,
        **({} if run.cost is None else asdict(run.cost)),
        **({} if quality is None else asdict(quality)),
    )


@dataclass(frozen=True)
class Difference(Sampled):
    """The mean paired distance of `schedule` less that of `against`, on the same samples: as it is, and as a share of
    the latter, `relative`, with its 95 % interval."""

    solver: str
    nfe: int
    samples: int
    schedule: str
    against: str
    difference: float
    relative: float
    relative_low: float
    relative_high: float
    cacher: str = NONE
    quantizer: str = NONE


def differences(runs: Sequence[tuple[Entry, Run]], samples: int) -> list[Difference]:
    """What is not fixed against the best fixed grid between the shared ends, and against the static grid; predictors
    also against the best static grid with corrections, as they may predict corrections themselves. What was learned for
    a cheaper network (`OF_STUDENT`) is set against what else was, and against its like of the teacher's own network.

    `runs` are those of one sampler and NFE; schedules measured on fewer than `samples` samples are left out.
    """
    means = {e.schedule: float(run.distance[:samples].mean()) for e, run in runs if e.samples >= samples}
    here = {e.schedule: (e, run.distance[:samples]) for e, run in runs if e.samples >= samples}
    fixed = [name for name, (e, _) in here.items() if e.kind == "fixed" and not parse(name).native]
    pairs = []
    for name, kind in ((name, e.kind) for name, (e, _) in here.items() if e.kind != "fixed"):
        full, at, student = name.partition(OF_STUDENT)
        static = STATIC + at + student
        shared = [other for other, (e, _) in here.items() if e.kind == STATIC and other != static]
        corrected = [other for other in shared if other.partition(OF_STUDENT)[2] == student]
        if fixed:
            pairs.append((name, min(fixed, key=lambda grid: means[grid])))
        if name != static and static in here:
            pairs.append((name, static))
        if kind in PREDICTORS and corrected:
            pairs.append((name, min(corrected, key=lambda grid: means[grid])))
        if at and full in here:
            pairs.append((name, full))
    found = []
    for name, against in pairs:
        (entry, distance), (_, other) = here[name], here[against]
        found.append(
            Difference(
                entry.solver, entry.nfe, samples, name, against, means[name] - means[against],
                ratio(distance, other), *ratio_interval(distance, other), entry.cacher, entry.quantizer,
            )
        )  # fmt: skip
    return found


def as_records(rows: Iterable[Row] | Iterable[Difference]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
