"""One run of the comparison: a schedule sampled on the test noises, and the file that it leaves.

    features, distance   of each sample          times       the grid of each sample
    pictures             of the first ones       seconds     an image
    cost                 bits, weight bytes, floating-point operations, memory
    probabilities, spatial, clip                 of each sample, where they are asked for (see `quality`)

The file is keyed by what was run. So an evaluation that was killed goes on, nothing is computed twice, and a schedule
that was learned anew is measured anew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from ts_adapt.evaluation.benchmark import Entry
from ts_adapt.evaluation.cost import count_flops, peak_memory
from ts_adapt.evaluation.metrics import Extractor
from ts_adapt.evaluation.quality import looks_of
from ts_adapt.files import read_tensors, write_tensors
from ts_adapt.interfaces import StepPolicy, TimeGrid, TsAdaptError
from ts_adapt.quantizers.network import size_of
from ts_adapt.search.objective import Batch, Objective

PICTURES = 16
COST_IMAGES = 2
"""Images that are sampled at once to count operations and memory."""
FURTHER = ("probabilities", "spatial", "clip")
Clip = Callable[[Tensor, slice], Tensor]
"""(images of the samples in a slice, that slice) -> their CLIP scores `(B,)`."""


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


def run_entry(
    entry: Entry,
    objective: Objective,
    batch: Batch,
    extractor: Extractor,
    folder: Path,
    *,
    batch_size: int,
    clip: Clip | None = None,
) -> Run:
    """Sample `entry` on `batch`, or read what an earlier evaluation of the very same kept."""
    batch = batch.rows(slice(0, entry.samples))
    run = kept_run(entry, folder)
    if run is not None and run.cost is not None:
        return run
    try:
        if run is None:
            run = _sampled(entry.policy, objective, batch, extractor, batch_size, clip)
        run = replace(run, cost=_cost(entry.policy, objective, batch))
    except TsAdaptError as error:
        raise TsAdaptError(f"{entry.sampler}, NFE {entry.nfe}, {entry.schedule}: {error}") from error
    _keep(run, folder / entry.file, _key(entry))
    return run


@torch.inference_mode()
def _sampled(
    schedule: StepPolicy | TimeGrid,
    objective: Objective,
    batch: Batch,
    extractor: Extractor,
    batch_size: int,
    clip: Clip | None,
) -> Run:
    looks: dict[str, list[Tensor]] = {}
    distances, pictures, seconds, times = [], [], [], []
    for start in range(0, len(batch), batch_size):
        rows = slice(start, start + batch_size)
        part = batch.rows(rows)
        began = time.perf_counter()
        solution = objective.student_solution(_rows(schedule, rows), part, check=True)
        images = objective.denoiser.decode(solution.x).float()
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        seconds.append((time.perf_counter() - began) / len(part))
        seen = looks_of(extractor, images) | ({} if clip is None else {"clip": clip(images, rows)})
        for name, tensor in seen.items():
            looks.setdefault(name, []).append(tensor.cpu().float())
        distances.append(objective.distance(images, objective.denoiser.decode(part.target)).cpu())
        times.append(solution.times.expand(len(part), -1).cpu())
        if start < PICTURES:
            pictures.append(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
    found = {name: torch.cat(parts) for name, parts in looks.items()}
    return Run(
        found.pop("features"),
        torch.cat(distances).float(),
        median(seconds[1:] or seconds),
        torch.cat(pictures)[:PICTURES],
        torch.cat(times),
        further=found,
    )


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
    return torch.frombuffer(bytearray(entry.fingerprint.encode()), dtype=torch.uint8).clone()


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
        values = [math.nan if value is None else value for value in astuple(run.cost)]
        tensors["cost"] = torch.tensor(values, dtype=torch.float64)
    write_tensors(path, tensors)


def kept_run(entry: Entry, folder: Path) -> Run | None:
    """The run of `entry` in `folder`, if it is whole and of this very entry; a run is a cache, so any other is None."""
    path, key, count = folder / entry.file, _key(entry), entry.samples
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
    further = {name: kept[name] for name in FURTHER if name in kept}
    cost = None
    if "cost" in kept:
        bits, size, flops, memory = (None if math.isnan(value) else value for value in kept["cost"].tolist())
        cost = RunCost(bits, None if size is None else int(size), flops or 0.0, int(memory or 0))
    return Run(
        kept["features"], kept["distance"], float(kept["seconds"]), kept["pictures"], kept["times"], cost, further
    )
