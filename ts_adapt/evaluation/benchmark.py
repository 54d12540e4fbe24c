"""The comparison: schedules x solvers x NFE on the same test noises, against the same teacher.

Each run of a schedule leaves one file (features, distances, seconds, a few pictures), keyed by what was run; the table
is derived from these files. So an evaluation that was killed goes on, nothing is computed twice, and a schedule that
was learned anew is measured anew. A Frechet distance depends on the number of samples: rows of different `samples` do
not compare, and everything is also scored on the oracle's subset.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ts_adapt.assembly import has_shared_ends
from ts_adapt.evaluation.metrics import FeatureStatistics, bootstrap_interval, difference_interval, frechet
from ts_adapt.files import read_tensors, write_tensors
from ts_adapt.interfaces import StepPolicy, TimeGrid, TsAdaptError
from ts_adapt.search.objective import Batch, Objective

PICTURES = 16
PER_SAMPLE = ("one-shot", "recursive", "oracle")


@dataclass
class EvaluateOptions:
    """What is measured."""

    samples: int = 2000
    """Test samples of every schedule but the oracle, which is measured on its labels' samples."""
    batch_size: int = 64
    features: str = "zoo"
    """The extractor of the Frechet distance: zoo (offline) or inception."""
    inception: str | None = None
    """A folder with clean-fid's Inception weights; None: downloaded."""
    reference: str | None = None
    """A folder of real images; None: the embedded statistics of the zoo's training images."""
    grids: list[str] | None = None
    """Fixed grids to compare, with +native or +rounded behind a name for other forms of it; None: all that fit the
    model, between the same ends."""
    schedules: list[str] = field(default_factory=list)
    """Schedule files to compare as well, each for the solver and the NFE it is for."""


@dataclass(frozen=True)
class Entry:
    """One schedule to be measured. `fingerprint` identifies what it is (see `fingerprint`); `samples` how many rows."""

    solver: str
    nfe: int
    schedule: str
    kind: str
    policy: StepPolicy | TimeGrid
    fingerprint: str
    samples: int

    @property
    def file(self) -> str:
        return f"{self.solver}-nfe{self.nfe}-{self.schedule}.safetensors"


@dataclass(frozen=True)
class Run:
    """What one entry gave: features `(n, D)`, distances `(n,)`, the first pictures (uint8), the times.

    seconds_per_image  the median over batches, the first one, which warms up, left out where there are others
    """

    features: Tensor
    distance: Tensor
    seconds_per_image: float
    pictures: Tensor
    times: Tensor


@dataclass(frozen=True)
class Row:
    """A line of results.csv."""

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


def run_entry(
    entry: Entry,
    objective: Objective,
    batch: Batch,
    extractor: Callable[[Tensor], Tensor],
    folder: Path,
    *,
    batch_size: int,
) -> Run:
    """Sample `entry` on `batch`, or read what an earlier evaluation of the very same kept."""
    path = folder / entry.file
    batch = batch.rows(slice(0, entry.samples))
    key = torch.frombuffer(bytearray(entry.fingerprint.encode()), dtype=torch.uint8).clone()
    kept = _kept(path, key, len(batch))
    if kept is not None:
        return kept
    features, distances, pictures, seconds = [], [], [], []
    times: list[Tensor] = []
    for start in range(0, len(batch), batch_size):
        rows = slice(start, start + batch_size)
        part = batch.rows(rows)
        policy = entry.policy.rows(rows) if isinstance(entry.policy, TimeGrid) else entry.policy
        with torch.inference_mode():
            began = time.perf_counter()
            try:
                solution = objective.student_solution(policy, part, check=True)
            except TsAdaptError as error:
                raise TsAdaptError(f"{entry.solver}, NFE {entry.nfe}, {entry.schedule}: {error}") from error
            images = objective.denoiser.decode(solution.x).float()
            if images.device.type == "cuda":
                torch.cuda.synchronize(images.device)
            seconds.append((time.perf_counter() - began) / len(part))
            features.append(extractor(images).cpu())
            distances.append(objective.distance(images, objective.denoiser.decode(part.target)).cpu())
            times.append(solution.times.expand(len(part), -1).cpu())
            if start < PICTURES:
                pictures.append(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
    run = Run(
        torch.cat(features).float(),
        torch.cat(distances).float(),
        median(seconds[1:] or seconds),
        torch.cat(pictures)[:PICTURES],
        torch.cat(times),
    )
    write_tensors(
        path,
        {
            "features": run.features,
            "distance": run.distance,
            "seconds": torch.tensor(run.seconds_per_image, dtype=torch.float64),
            "pictures": run.pictures,
            "times": run.times,
            "fingerprint": key,
        },
    )
    return run


def _kept(path: Path, key: Tensor, count: int) -> Run | None:
    """The run in `path`, if it is whole and of this very `key` and `count`; a run is a cache, so any other is None."""
    if not path.exists():
        return None
    shapes = {
        "features": (count, None), "distance": (count,), "seconds": (), "pictures": (min(count, PICTURES), *3 * [None]),
        "times": (count, None), "fingerprint": (len(key),),
    }  # fmt: skip
    try:
        kept = read_tensors(path, shapes)
    except TsAdaptError:
        return None
    if not torch.equal(kept["fingerprint"], key):
        return None
    return Run(kept["features"], kept["distance"], float(kept["seconds"]), kept["pictures"], kept["times"])


def score(
    entry: Entry, run: Run, samples: int, data: FeatureStatistics, teacher_features: Tensor, model: str, seed: int
) -> Row:
    """The table's row of `entry` on its first `samples` test samples."""
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
    )


@dataclass(frozen=True)
class Difference:
    """The mean paired distance of `schedule` less that of `against`, on the same samples, with its 95 % interval."""

    solver: str
    nfe: int
    samples: int
    schedule: str
    against: str
    difference: float
    low: float
    high: float


def differences(runs: Sequence[tuple[Entry, Run]], samples: int) -> list[Difference]:
    """What is not fixed against the best fixed grid between the shared ends, and what is per sample against static.

    `runs` are those of one solver and NFE; schedules measured on fewer than `samples` samples are left out.
    """
    means = {e.schedule: float(run.distance[:samples].mean()) for e, run in runs if e.samples >= samples}
    here = {e.schedule: (e, run.distance[:samples]) for e, run in runs if e.samples >= samples}
    fixed = [name for name, (e, _) in here.items() if e.kind == "fixed" and has_shared_ends(name)]
    pairs = []
    for name, (entry, _) in here.items():
        if entry.kind != "fixed" and fixed:
            pairs.append((name, min(fixed, key=lambda grid: means[grid])))
        if entry.kind in PER_SAMPLE and "static" in here:
            pairs.append((name, "static"))
    found = []
    for name, against in pairs:
        (entry, distance), (_, other) = here[name], here[against]
        low, high = difference_interval(distance, other)
        found.append(
            Difference(entry.solver, entry.nfe, samples, name, against, means[name] - means[against], low, high)
        )
    return found


def as_records(rows: Iterable[Row] | Iterable[Difference]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
