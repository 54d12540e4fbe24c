"""One run of the comparison: a schedule sampled on the test noises, and the file that it leaves.

    features, distance   of each sample          times       the grid of each sample
    pictures             of the first ones       seconds     an image
    cost                 bits, weight bytes, floating-point operations, memory
    probabilities, spatial, clip                 of each sample, where they are asked for (see `quality`)

The file is keyed by what was run. So an evaluation that was killed goes on, nothing is computed twice, and a schedule
that was learned anew is measured anew. Samples are taken in parts of PART batches, the unit of work: each leaves a file
under `parts` with the same per sample (of images only the pictures), until the run is joined from them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from ts_adapt import distributed
from ts_adapt.evaluation.benchmark import Entry, fingerprint
from ts_adapt.evaluation.cost import count_flops, peak_memory
from ts_adapt.evaluation.metrics import Extractor
from ts_adapt.evaluation.quality import looks_of
from ts_adapt.files import check_shapes, read_tensors, write_tensors
from ts_adapt.interfaces import StepPolicy, TimeGrid, TsAdaptError
from ts_adapt.quantizers.quantization import size_of
from ts_adapt.search.objective import Batch, Objective

PART, PARTS = 4, "parts"
"""Batches of a part, and where parts are kept."""
PICTURES = 16
COST_IMAGES = 2
"""Images that are sampled at once to count operations and memory."""
FURTHER = ("probabilities", "spatial", "clip")
NOT_KNOWN = -1.0
"""Stands in a run file for a cost that does not apply."""
BYTES, NUMBERS = (torch.uint8,), (torch.float32, torch.float64)
OF_BYTES = ("fingerprint", "pictures")
"""The types of the tensors in a run file, and which of them hold bytes."""
Shape = tuple[int | None, ...]
Clip = Callable[[Tensor, slice], Tensor]
"""(images of the samples in a slice, that slice) -> their CLIP scores `(B,)`."""


class RunError(TsAdaptError):
    """A run that could not be sampled, or its cost not be measured; says which one and why."""


@dataclass(frozen=True)
class RunCost:
    """bits, weight_bytes, flops and peak_memory as in `benchmark.Row`."""

    bits: float | None
    weight_bytes: int | None
    flops: float
    peak_memory: int


@dataclass(frozen=True)
class Run:
    """What one entry gave: features `(n, D)`, distances `(n,)`, the first pictures (uint8), the times.

    seconds_per_image  the median over batches, the first one, which warms up, left out where there are others
    cost               None: of an earlier version, which did not measure it
    further            what else is known of the samples, of `FURTHER`
    """

    features: Tensor
    distance: Tensor
    seconds_per_image: float
    pictures: Tensor
    times: Tensor
    cost: RunCost | None = None
    further: dict[str, Tensor] = field(default_factory=dict)


def parts_of(entry: Entry, batch_size: int) -> list[range]:
    """The rows of each part."""
    size = PART * batch_size
    return [range(start, min(start + size, entry.samples)) for start in range(0, entry.samples, size)]


def missing_parts(entry: Entry, folder: Path, batch_size: int) -> list[range]:
    """The parts that are to be sampled before `join_parts`; none where there is a run."""
    if kept_run(entry, folder) is not None:
        return []
    return [rows for rows in parts_of(entry, batch_size) if _kept_part(entry, folder, rows, batch_size) is None]


def sample_part(
    entry: Entry,
    objective: Objective,
    batch: Batch,
    extractor: Extractor,
    folder: Path,
    rows: range,
    *,
    batch_size: int,
    clip: Clip | None = None,
) -> None:
    """Sample `entry` on the `rows` of `batch`, a part of it, and keep what came out. Raises RunError."""
    with _naming(entry):
        part = _sampled(entry.policy, objective, batch, extractor, rows, batch_size, clip)
    write_tensors(_part_file(entry, folder, rows), {**part, "fingerprint": _part_key(entry, rows, batch_size)})


def join_parts(entry: Entry, objective: Objective, batch: Batch, folder: Path, *, batch_size: int) -> None:
    """Make the run of its parts, unless there is one, and measure what it costs.

    Raises TsAdaptError for a part that is missing, and RunError.
    """
    run = kept_run(entry, folder)
    run = _joined(entry, folder, batch_size) if run is None else run
    with _naming(entry):
        run = replace(run, cost=_cost(entry.policy, objective, batch.rows(slice(0, entry.samples))))
    _keep(run, folder / entry.file, _key(entry))
    for rows in parts_of(entry, batch_size):
        _part_file(entry, folder, rows).unlink(missing_ok=True)


def _joined(entry: Entry, folder: Path, batch_size: int) -> Run:
    parts = []
    distributed.await_files([_part_file(entry, folder, rows) for rows in parts_of(entry, batch_size)])
    for rows in parts_of(entry, batch_size):
        part = _kept_part(entry, folder, rows, batch_size)
        if part is None:
            raise TsAdaptError(f"{_part_file(entry, folder, rows)} is missing or damaged; run the same command again")
        parts.append(part)
    found = {name: torch.cat([part[name] for part in parts if name in part]) for name in parts[0]}
    seconds = found["seconds"].tolist()
    return Run(
        found["features"],
        found["distance"],
        median(seconds[1:] or seconds),
        found["pictures"][:PICTURES],
        found["times"],
        further={name: found[name] for name in FURTHER if name in found},
    )


@contextmanager
def _naming(entry: Entry) -> Iterator[None]:
    """A TsAdaptError of the block becomes a RunError, which says which run it is of."""
    try:
        yield
    except TsAdaptError as error:
        raise RunError(f"{entry.sampler}, NFE {entry.nfe}, {entry.schedule}: {error}") from error


@torch.inference_mode()
def _sampled(
    schedule: StepPolicy | TimeGrid,
    objective: Objective,
    batch: Batch,
    extractor: Extractor,
    samples: range,
    batch_size: int,
    clip: Clip | None,
) -> dict[str, Tensor]:
    """What there is to know of each of the `samples`; of each batch its seconds an image."""
    looks: dict[str, list[Tensor]] = {}
    seconds = []
    for start in range(samples.start, samples.stop, batch_size):
        rows = slice(start, min(start + batch_size, samples.stop))
        part = batch.rows(rows)
        began = time.perf_counter()
        solution = objective.student_solution(_rows(schedule, rows), part, check=True)
        images = objective.denoiser.decode(solution.x).float()
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        seconds.append((time.perf_counter() - began) / len(part))
        seen = looks_of(extractor, images) | ({} if clip is None else {"clip": clip(images, rows)})
        seen = {name: tensor.cpu().float() for name, tensor in seen.items()}
        seen["distance"] = objective.distance(images, objective.denoiser.decode(part.target)).cpu().float()
        seen["times"] = solution.times.expand(len(part), -1).cpu()
        if start < PICTURES:
            seen["pictures"] = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
        for name, tensor in seen.items():
            looks.setdefault(name, []).append(tensor)
    return {name: torch.cat(found) for name, found in looks.items()} | {"seconds": torch.tensor(seconds).double()}


@torch.inference_mode()
def _cost(schedule: StepPolicy | TimeGrid, objective: Objective, batch: Batch) -> RunCost:
    rows = slice(0, COST_IMAGES)
    part, policy = batch.rows(rows), _rows(schedule, rows)

    def solve() -> Tensor:
        return objective.denoiser.decode(objective.student(policy, part))

    flops, memory = count_flops(solve) / len(part), peak_memory(solve, part.x_T.device)
    network = getattr(objective.denoiser, "network", None)
    if not isinstance(network, nn.Module):
        return RunCost(None, None, flops, memory)
    size = size_of(network)
    return RunCost(size.bits or 8 * size.weight_bytes / size.all_weights, size.weight_bytes, flops, memory)


def _rows(schedule: StepPolicy | TimeGrid, rows: slice) -> StepPolicy | TimeGrid:
    return schedule.rows(rows) if isinstance(schedule, TimeGrid) else schedule


def _key(entry: Entry) -> Tensor:
    return _as_bytes(entry.fingerprint)


def _part_key(entry: Entry, rows: range, batch_size: int) -> Tensor:
    return _as_bytes(fingerprint(entry.fingerprint, rows.start, rows.stop, batch_size))


def _as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).clone()


def _part_file(entry: Entry, folder: Path, rows: range) -> Path:
    return folder / PARTS / f"{Path(entry.file).stem}-{rows.start:06d}.safetensors"


def _kept_part(entry: Entry, folder: Path, rows: range, batch_size: int) -> dict[str, Tensor] | None:
    """What was kept of these rows, if it is whole and of this very entry."""
    path, key = _part_file(entry, folder, rows), _part_key(entry, rows, batch_size)
    shapes: dict[str, Shape] = {
        "features": (len(rows), None), "distance": (len(rows),), "times": (len(rows), None), "seconds": (None,),
        "fingerprint": (None,),
    }  # fmt: skip
    return _kept(path, key, shapes)


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
    return kept if torch.equal(kept["fingerprint"], key) and bool((kept["seconds"] >= 0).all()) else None


def _keep(run: Run, path: Path, key: Tensor) -> None:
    tensors = {
        "features": run.features,
        "distance": run.distance,
        "seconds": torch.tensor(run.seconds_per_image, dtype=torch.float64),
        "pictures": run.pictures,
        "times": run.times,
        "fingerprint": key,
        **run.further,
    }
    if run.cost is not None:
        values = [NOT_KNOWN if value is None else value for value in astuple(run.cost)]
        tensors["cost"] = torch.tensor(values, dtype=torch.float64)
    write_tensors(path, tensors)


def kept_run(entry: Entry, folder: Path) -> Run | None:
    """The run of `entry` in `folder`, if it is whole and of this very entry; a run is a cache, so any other is None."""
    count = entry.samples
    shapes: dict[str, Shape] = {
        "features": (count, None), "distance": (count,), "seconds": (), "pictures": (min(count, PICTURES), *3 * [None]),
        "times": (count, None), "fingerprint": (None,),
    }  # fmt: skip
    where_known: dict[str, Shape] = {
        "cost": (4,), "probabilities": (count, None), "spatial": (count, None), "clip": (count,),
    }  # fmt: skip
    kept = _kept(folder / entry.file, _key(entry), shapes, where_known)
    if kept is None:
        return None
    further = {name: kept[name] for name in FURTHER if name in kept}
    cost = None
    if "cost" in kept:
        bits, size, flops, memory = (None if value < 0 else value for value in kept["cost"].tolist())
        cost = RunCost(bits, None if size is None else int(size), flops or 0.0, int(memory or 0))
    return Run(
        kept["features"], kept["distance"], float(kept["seconds"]), kept["pictures"], kept["times"], cost, further
    )
