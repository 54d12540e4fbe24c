"""What a comparison is made of, and what each run of it leaves.

It is schedules x solvers x NFE x students on the same test noises, against the same teacher, who samples in
full precision. An `Entry` is one schedule to be measured, a `Run` what it gave, a `Row` its scores, a `Difference` two
runs on the same samples. What compares is of one sampler (solver and student) and NFE. A Frechet distance
depends on the number of samples: rows of different `samples` do not compare, and everything is also scored on the
oracle's subset.

The file of a run:

    features, distance   of each sample          times       the grid of each sample
    pictures             of the first ones       seconds     an image
    cost                 bits, weight bytes, floating-point operations, memory
    probabilities, spatial, clip                 of each sample, where they are asked for (see `quality`)

It is keyed by what was run. So an evaluation that was killed goes on, nothing is computed twice, and a schedule that
was learned anew is measured anew. Samples are taken in parts of PART batches, the unit of work: each leaves a file
under `parts` with the same per sample (of images only the pictures), until the run is joined from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from ts_adapt.assembly import AXES, FULL, NONE, by_axis, student_name
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.features import EXTRACTORS
from ts_adapt.interfaces import StepPolicy, TimeGrid
from ts_adapt.options import MANY, Between, Count, OneOf, PathText
from ts_adapt.storage.files import check_shapes, read_tensors, write_tensors
from ts_adapt.storage.layout import run_file, run_part

STATIC = "static"
"""The schedule that all others are set against: one learned grid for all samples, nothing but its times learned."""
ORACLE = "oracle"
"""The kind of grids that were searched for each sample, and the name of those whose times alone were."""

PART = 4
"""Batches of a part."""
PICTURES = 16
FURTHER = ("probabilities", "spatial", "clip")
NOT_KNOWN = -1.0
"""Stands in a run file for a cost that does not apply."""
BYTES, NUMBERS = (torch.uint8,), (torch.float32, torch.float64)
OF_BYTES = ("fingerprint", "pictures")
"""The types of the tensors in a run file, and which of them hold bytes."""
Shape = tuple[int | None, ...]


@dataclass
class EvaluateOptions:
    """What is measured, and what of it the tables show."""

    samples: Annotated[int, Between(2, MANY)] = 2000
    """Test samples of every schedule but the oracle, which is measured on its labels' samples."""
    batch_size: Count = 64
    features: Annotated[str, OneOf(EXTRACTORS)] | None = None
    """The extractor of the Frechet distance: zoo (offline, what the distance `features` sees too), judge (offline, of
    no loss), inception, or pixels (the samples as they are); None: zoo where it knows such images, else pixels of small
    ones, else inception."""
    inception: PathText | None = None
    """A folder with clean-fid's Inception weights; None: downloaded."""
    reference: PathText | None = None
    """A folder of real images, of the model's size but for inception, an .npz file of the mu and sigma of their
    features, or clean-fid's by name, clean-fid:cifar10-train-32; None: the embedded statistics of the data that the
    zoo's models were trained on."""
    grids: list[str] | None = None
    """Fixed grids to compare, with +native or +rounded behind a name for other forms of it; None: all that fit the
    model, between the same ends."""
    schedules: list[PathText] = field(default_factory=list)
    """What to compare as well, for the solver and every NFE that it was learned for: schedule files, schedules of the
    zoo by name, folders or hub ids of a LearnedScheduler."""
    clip: PathText | None = None
    """A CLIP model of transformers, a folder or hub id, for the CLIP score of prompts; zoo: the embedded dual encoder,
    which knows emoji; None: no score."""
    resamples: Annotated[int, Between(0, MANY)] | None = None
    """Halves of a folder that the intervals of its scores come from (--images); 0: no intervals; None: 200, of features
    of more than 1024 numbers 50."""
    columns: list[Annotated[str, OneOf(COLUMNS)]] | None = None
    """What the tables show, by the names of the columns in results.csv (distance, kid, sfid, flops, ...) as far as
    they have values; None: the usual ones."""


def sampler_name(solver: str, parts: Sequence[str]) -> str:
    """The solver, and behind it the `parts` of the student that there are: `ddim`, `ddim, deepcache-2, hqq4`."""
    return ", ".join([solver, *(part for part in parts if part != NONE)])


def skip_said(parts: Sequence[str], reason: str) -> str:
    """What is said of a student, or of a run of it, that was skipped."""
    return f"skipped: {student_name(parts) or 'the full network'}: {reason}"


def with_parts(record: Any) -> Any:
    """A `record` that names a student by its parts, `none` for those that it does not know: it is from before them.
    What is no record stays what it is, for who checks it."""
    return {**by_axis(FULL.parts), **record} if isinstance(record, Mapping) else record


def parts_in(record: Any) -> tuple[str, ...]:
    """The parts of the student that a `record` names; TypeError or KeyError for what is none."""
    return tuple(with_parts(record)[axis] for axis in AXES)


class Sampled:
    """What a thing of the comparison is sampled with."""

    solver: str
    nfe: int
    schedule: str

    @property
    def parts(self) -> tuple[str, ...]:
        """Of the student, for each of AXES."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def sampler(self) -> str:
        """See `sampler_name`."""
        return sampler_name(self.solver, self.parts)

    @property
    def file(self) -> str:
        """The name of its run file."""
        return run_file(self.sampler, self.nfe, self.schedule)


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
    pruned: str = NONE
    cacher: str = NONE
    quantizer: str = NONE


@dataclass(frozen=True)
class RunCost:
    """bits, weight_bytes, flops and peak_memory as in `Row`."""

    bits: float | None
    weight_bytes: int | None
    flops: float
    peak_memory: int


@dataclass(frozen=True)
class Run:
    """What one entry gave: features `(n, D)`, distances `(n,)`, the first pictures (uint8), the times.

    seconds_per_image  the median over batches, the first one, which warms up, left out where there are others
    further            what else is known of the samples, of `FURTHER`
    """

    features: Tensor
    distance: Tensor
    seconds_per_image: float
    pictures: Tensor
    times: Tensor
    cost: RunCost
    further: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Row(Sampled):
    """A line of results.csv.

    distance         the mean paired distance to the teacher, with its 95 % interval
    distance_median  of the same distances: what a few samples that end in another mode do not move
    wins             the share of the samples on which it is nearer to the teacher than the static grid, ties by half
    bits             of a quantized weight, with all that is kept of it; without a quantizer those of its precision
    weight_bytes     of the network
    flops            of one image
    peak_memory      bytes that sampling COST_IMAGES (`sample`) images at once needs beyond the weights
    kid ...          see `quality`

    None is what does not apply: wins without a static grid beside it, distances to the data where there are no real
    images, weights of a model without a network, ...
    """

    model: str
    solver: str
    nfe: int
    schedule: str
    kind: str
    samples: int
    fid_data: float | None
    fid_teacher: float | None
    distance: float
    distance_low: float
    distance_high: float
    seconds_per_image: float
    seed: int
    distance_median: float
    wins: float | None = None
    pruned: str = NONE
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


COLUMNS = [column.name for column in fields(Row)]
"""Of results.csv."""


@dataclass(frozen=True)
class Difference(Sampled):
    """The paired distance of `schedule` against that of `against`, on the same samples.

    difference       of their means
    relative         that difference as a share of the latter's mean, with its 95 % interval
    relative_median  the same of their medians
    wins             the share of the samples on which `schedule` is nearer to the teacher, ties by half
    """

    solver: str
    nfe: int
    samples: int
    schedule: str
    against: str
    difference: float
    relative: float
    relative_low: float
    relative_high: float
    relative_median: float
    wins: float
    pruned: str = NONE
    cacher: str = NONE
    quantizer: str = NONE


def fingerprint(*parts: object) -> str:
    """A hash of tensors, state dicts and plain values."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, TimeGrid):
            others = [(field.name, value) for field, value in part.others.items()]
            part = [part.times, part.model_times, part.output_scale, part.coefficients, *others]
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


def as_bytes(text: str) -> Tensor:
    """A text as a tensor of bytes, which a file of tensors can hold."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).clone()


def parts_of(entry: Entry, batch_size: int) -> list[range]:
    """The rows of each part."""
    size = PART * batch_size
    return [range(start, min(start + size, entry.samples)) for start in range(0, entry.samples, size)]


def part_file(entry: Entry, folder: Path, rows: range) -> Path:
    """Where the part of these rows is kept."""
    return folder / run_part(entry.file, rows.start)


def keep_part(part: dict[str, Tensor], entry: Entry, folder: Path, rows: range, batch_size: int) -> None:
    """Write what was sampled of these rows."""
    write_tensors(part_file(entry, folder, rows), {**part, "fingerprint": _part_key(entry, rows, batch_size)})


def kept_part(entry: Entry, folder: Path, rows: range, batch_size: int) -> dict[str, Tensor] | None:
    """What was kept of these rows, if it is whole and of this very entry."""
    shapes: dict[str, Shape] = {
        "features": (len(rows), None), "distance": (len(rows),), "times": (len(rows), None), "seconds": (None,),
        "fingerprint": (None,),
    }  # fmt: skip
    return _kept(part_file(entry, folder, rows), _part_key(entry, rows, batch_size), shapes)


def keep_run(run: Run, entry: Entry, folder: Path) -> None:
    """Write the run of `entry`."""
    costs = [NOT_KNOWN if value is None else value for value in astuple(run.cost)]
    tensors = {
        "features": run.features, "distance": run.distance, "pictures": run.pictures, "times": run.times,
        "seconds": torch.tensor(run.seconds_per_image, dtype=torch.float64),
        "cost": torch.tensor(costs, dtype=torch.float64), "fingerprint": as_bytes(entry.fingerprint),
    }  # fmt: skip
    write_tensors(folder / entry.file, {**tensors, **run.further})


def kept_run(entry: Entry, folder: Path) -> Run | None:
    """The run of `entry` in `folder`, if it is whole and of this very entry; a run is a cache, so any other is None."""
    count = entry.samples
    shapes: dict[str, Shape] = {
        "features": (count, None), "distance": (count,), "seconds": (), "pictures": (min(count, PICTURES), *3 * [None]),
        "times": (count, None), "cost": (4,), "fingerprint": (None,),
    }  # fmt: skip
    where_known: dict[str, Shape] = {"probabilities": (count, None), "spatial": (count, None), "clip": (count,)}
    kept = _kept(folder / entry.file, as_bytes(entry.fingerprint), shapes, where_known)
    if kept is None:
        return None
    bits, size, flops, memory = kept["cost"].tolist()
    cost = RunCost(None if bits < 0 else bits, None if size < 0 else int(size), flops, int(memory))
    further = {name: kept[name] for name in FURTHER if name in kept}
    seconds = float(kept["seconds"])
    return Run(kept["features"], kept["distance"], seconds, kept["pictures"], kept["times"], cost, further)


def _part_key(entry: Entry, rows: range, batch_size: int) -> Tensor:
    return as_bytes(fingerprint(entry.fingerprint, rows.start, rows.stop, batch_size))


def _kept(
    path: Path, key: Tensor, shapes: Mapping[str, Shape], where_known: Mapping[str, Shape] | None = None
) -> dict[str, Tensor] | None:
    """The tensors in `path`, if they have this `key` among them, these shapes, and the types that are written."""
    if not path.exists():
        return None
    try:
        kept = read_tensors(path, shapes)
        check_shapes(kept, {name: shape for name, shape in (where_known or {}).items() if name in kept}, path)
    except TsAdaptError:
        return None
    if any(value.dtype not in (BYTES if name in OF_BYTES else NUMBERS) for name, value in kept.items()):
        return None
    negative = (kept["seconds"] < 0).any() or ("cost" in kept and (kept["cost"][2:] < 0).any())
    return kept if torch.equal(kept["fingerprint"], key) and not negative else None
