"""One schedule of the comparison sampled on the test noises, part by part, joined to a run, and its cost measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from ts_adapt import distributed
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.cost import count_flops, peak_memory
from ts_adapt.evaluation.features import Extractor, looks_of
from ts_adapt.evaluation.records import (
    FURTHER,
    PICTURES,
    Entry,
    Run,
    RunCost,
    keep_part,
    keep_run,
    kept_part,
    kept_run,
    part_file,
    parts_of,
)
from ts_adapt.interfaces import StepPolicy, TimeGrid
from ts_adapt.quantizers.quantization import size_of
from ts_adapt.search.objective import Batch, Objective

COST_IMAGES = 2
"""Images that are sampled at once to count operations and memory."""
Clip = Callable[[Tensor, slice], Tensor]
"""(images of the samples in a slice, that slice) -> their CLIP scores `(B,)`."""


class RunError(TsAdaptError):
    """A run that could not be sampled, or its cost not be measured; says which one and why."""


def missing_parts(entry: Entry, folder: Path, batch_size: int) -> list[range]:
    """The parts that are to be sampled before `join_parts`; none where there is a run."""
    if kept_run(entry, folder) is not None:
        return []
    return [rows for rows in parts_of(entry, batch_size) if kept_part(entry, folder, rows, batch_size) is None]


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
    keep_part(part, entry, folder, rows, batch_size)


def join_parts(entry: Entry, objective: Objective, batch: Batch, folder: Path, *, batch_size: int) -> None:
    """Make the run of its parts, unless there is one, and measure what it costs.

    Raises TsAdaptError for a part that is missing, and RunError.
    """
    if kept_run(entry, folder) is None:
        found = _joined(entry, folder, batch_size)
        with _naming(entry):
            cost = _cost(entry.policy, objective, batch.rows(slice(0, entry.samples)))
        seconds = found["seconds"].tolist()
        further = {name: found[name] for name in FURTHER if name in found}
        pictures, seconds_per_image = found["pictures"][:PICTURES], median(seconds[1:] or seconds)
        run = Run(found["features"], found["distance"], seconds_per_image, pictures, found["times"], cost, further)
        keep_run(run, entry, folder)
    remove_parts(entry, folder, batch_size=batch_size)


def remove_parts(entry: Entry, folder: Path, *, batch_size: int) -> None:
    """Of a run that is made of them already."""
    for rows in parts_of(entry, batch_size):
        part_file(entry, folder, rows).unlink(missing_ok=True)


def _joined(entry: Entry, folder: Path, batch_size: int) -> dict[str, Tensor]:
    parts = []
    distributed.await_files([part_file(entry, folder, rows) for rows in parts_of(entry, batch_size)])
    for rows in parts_of(entry, batch_size):
        part = kept_part(entry, folder, rows, batch_size)
        if part is None:
            raise TsAdaptError(f"{part_file(entry, folder, rows)} is missing or damaged; run the same command again")
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in parts[0]}


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
        images = objective.denoiser.decode(solution.x, part.condition).float()
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        seconds.append((time.perf_counter() - began) / len(part))
        seen = looks_of(extractor, images) | ({} if clip is None else {"clip": clip(images, rows)})
        seen = {name: tensor.cpu().float() for name, tensor in seen.items()}
        seen["distance"] = (
            objective.distance(images, objective.denoiser.decode(part.target, part.condition)).cpu().float()
        )
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
        return objective.denoiser.decode(objective.student(policy, part), part.condition)

    flops, memory = count_flops(solve) / len(part), peak_memory(solve, part.x_T.device)
    network = objective.denoiser.network
    size = None if network is None else size_of(network)
    if size is None or not size.all_weights:
        return RunCost(None, None, flops, memory)
    return RunCost(size.bits or 8 * size.weight_bytes / size.all_weights, size.weight_bytes, flops, memory)


def _rows(schedule: StepPolicy | TimeGrid, rows: slice) -> StepPolicy | TimeGrid:
    return schedule.rows(rows) if isinstance(schedule, TimeGrid) else schedule
