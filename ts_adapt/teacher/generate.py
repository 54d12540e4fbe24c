"""Generates the teacher's samples: the fine solve of

    x_T = noise_scale * initial_noise(seed, i),   condition_i = draw(seed, i)      i = first, first + 1, ...

shard by shard. A shard is cut into batches from its own start, so what it holds depends on the config and on nothing
that happened before: killed at any moment and started again, a run ends in the same bytes as an unbroken one. Several
processes (`distributed`) share the shards among them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from tqdm import tqdm

from ts_adapt import distributed
from ts_adapt.denoisers.wrapped import Wrapped
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Denoiser, NoiseSchedule, Solver, TimeGrid
from ts_adapt.numerics import validate_grid
from ts_adapt.prompts import prompts_of
from ts_adapt.sampling import initial_noise, integrate, noise_for, noise_scale
from ts_adapt.storage import files
from ts_adapt.storage.layout import image_file
from ts_adapt.teacher.store import TEST_END, TEST_START, TeacherStore, condition_of

LABEL_STREAM = -1
"""The stream of `initial_noise` that class labels are drawn from; x_T has 0, the solvers' noise those above."""
SCALE_STREAM = -2
"""That of the scales of guidance."""


class ConditionSource(Protocol):
    """Where the condition of each sample comes from; a function of (seed, i)."""

    def describe(self) -> dict[str, Any]:
        """What determines the conditions, as JSON."""
        ...

    def draw(self, seed: int, index: Sequence[int]) -> dict[str, Tensor]:
        """The tensors `(n, ...)` kept for these samples; `a.b` is the entry b of the denoiser's argument a."""
        ...


class ClassLabels:
    """`class_labels` `(n,)` int64: uniform on 0 .. classes - 1, drawn for each sample, or `label` for all."""

    def __init__(self, classes: int, label: int | None = None) -> None:
        if label is not None and not 0 <= label < classes:
            raise TsAdaptError(f"the class label is {label}; this model has classes 0 to {classes - 1}")
        self.classes, self.label = classes, label

    def describe(self) -> dict[str, Any]:
        return {"kind": "class_labels", "classes": self.classes, "label": self.label}

    def draw(self, seed: int, index: Sequence[int]) -> dict[str, Tensor]:
        if self.label is not None:
            return {"class_labels": torch.full((len(index),), self.label)}
        uniform = _uniform(seed, index, LABEL_STREAM)
        return {"class_labels": (uniform * self.classes).long().clamp(max=self.classes - 1)}


class Scales:
    """`guidance_scale` `(n,)` float64: log-uniform on `low` .. `high`, drawn for each sample; equal ends for all."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def describe(self) -> dict[str, Any]:
        return {"kind": "guidance_scale", "low": self.low, "high": self.high}

    def draw(self, seed: int, index: Sequence[int]) -> dict[str, Tensor]:
        if self.low == self.high:
            return {"guidance_scale": torch.full((len(index),), self.low, dtype=torch.float64)}
        drawn = self.low * (self.high / self.low) ** _uniform(seed, index, SCALE_STREAM)
        return {"guidance_scale": drawn.clamp(self.low, self.high)}


class Prompts:
    """The prompts that `prompts_of` says; what `encode` makes of each is kept with its `prompt_index`.

    encode  prompts -> tensors by name `(n, ...)`, such as `encoder_hidden_states`; `a.b` as in `ConditionSource`
    """

    def __init__(self, prompts: Sequence[str], encode: Callable[[list[str]], Mapping[str, Tensor]]) -> None:
        if not prompts:
            raise TsAdaptError("the list of prompts is empty; give at least one, one a line")
        self.prompts, self.encode = list(prompts), encode

    def describe(self) -> dict[str, Any]:
        return {"kind": "prompts", "count": len(self.prompts), "sha256": files.sha256_of_json(self.prompts)}

    def draw(self, seed: int, index: Sequence[int]) -> dict[str, Tensor]:
        chosen = torch.tensor([i % len(self.prompts) for i in index])
        return {"prompt_index": chosen, **self.encode(prompts_of(self.prompts, index))}


class Numbers:
    """`number` and `seed` `(n,)`: the samples' own; `of` identifies the list that they choose from."""

    def __init__(self, of: str) -> None:
        self.of = of

    def describe(self) -> dict[str, Any]:
        return {"kind": "numbers", "sha256": self.of}

    def draw(self, seed: int, index: Sequence[int]) -> dict[str, Tensor]:
        return {"number": torch.tensor(list(index)), "seed": torch.full((len(index),), seed)}


class Together:
    """What several sources say of each sample."""

    def __init__(self, sources: Sequence[ConditionSource]) -> None:
        self.sources = sources

    def describe(self) -> dict[str, Any]:
        return {"kind": "together", "parts": [source.describe() for source in self.sources]}

    def draw(self, seed: int, index: Sequence[int]) -> dict[str, Tensor]:
        return {name: value for source in self.sources for name, value in source.draw(seed, index).items()}


def classes_of(described: Mapping[str, Any] | None) -> int:
    """How many classes a source draws from, of what it says of itself; 0: none."""
    parts = (described or {}).get("parts", [])
    return max([int((described or {}).get("classes", 0)), *map(classes_of, parts)])


def class_labels_for(denoiser: Denoiser, label: int | None = None) -> ClassLabels | None:
    """The labels that a class-conditional denoiser wants; None for any other. The null class is never drawn.

    Raises TsAdaptError if the model has no classes though a `label` is given, or no such class.
    """
    null = (denoiser.null_condition or {}).get("class_labels")
    config = getattr(denoiser.network, "config", None)
    classes = null if isinstance(null, int) else None if denoiser.loop else getattr(config, "num_class_embeds", None)
    if classes is None:
        if label is not None:
            raise TsAdaptError(f"the class label {label} is given, but this model has no classes; leave it out")
        return None
    return ClassLabels(int(classes), label)


def weights_hash(denoiser: Denoiser) -> str:
    """sha256 of the parameters and buffers of the denoiser's network and parts; of its tensors, for an analytic one."""
    network = denoiser.network
    if network is not None:
        others = {f"{name}.{key}": v for name, part in denoiser.parts.items() for key, v in part.state_dict().items()}
        return files.sha256_of_tensors(_plain({**network.state_dict(), **others}))
    return files.sha256_of_tensors(_tensors_of(denoiser))


def _tensors_of(denoiser: Denoiser) -> dict[str, Tensor]:
    inside = _tensors_of(denoiser.denoiser) if isinstance(denoiser, Wrapped) else {}
    return inside | {key: value for key, value in vars(denoiser).items() if isinstance(value, Tensor)}


def _plain(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """`tensors`, and in place of one that a library has made of others (codes, scales) those."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        inner = value.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(value) else ()
        found |= _plain({f"{key}.{name}": getattr(value, name) for name in inner}) if inner else {key: value}
    return found


def teacher_config(
    denoiser: Denoiser,
    solver: str,
    grid: TimeGrid | Tensor,
    *,
    model: str,
    seed: int,
    first: int,
    shape: Sequence[int],
    shard_size: int,
    batch_size: int,
    condition: ConditionSource | None = None,
    trajectory: bool = False,
    dtype: str = "float32",
    **further: Any,
) -> dict[str, Any]:
    """The config of a `TeacherStore`: everything that the samples depend on, what is chosen first, what follows last.

    solver   its name, which says all of its options
    model    the name the denoiser was loaded by; its weights and its noise schedule on the grid are hashed besides
    first    index of the first sample: TRAIN_START or TEST_START
    shape    of a sample, without the batch
    dtype    the network's precision
    further  other settings that the samples depend on (guidance, ...), as JSON
    """
    times = _shared_times(grid)
    return {
        "model": model,
        "solver": solver,
        "times": times.tolist(),
        "seed": seed,
        "first": first,
        "shape": list(shape),
        "dtype": dtype,
        "condition": condition.describe() if condition is not None else None,
        "shard_size": shard_size,
        "batch_size": batch_size,
        "trajectory": trajectory,
        **further,
        "weights": weights_hash(denoiser),
        "noise": _noise_hash(denoiser.noise_schedule, times),
        "noise_scale": noise_scale(denoiser.noise_schedule),
        "prediction": denoiser.prediction,
    }


def generate(
    denoiser: Denoiser,
    solver: Solver,
    grid: TimeGrid | Tensor,
    store: TeacherStore,
    *,
    samples: int,
    batch_size: int,
    condition: ConditionSource | None = None,
    save_png: bool = False,
    progress: bool = True,
    announce: Callable[[int], None] | None = None,
) -> None:
    """Bring `store` to `samples` samples; shards that are there and intact stay, damaged ones are made anew.

    Where torch's processes have joined, all of them call this.

    grid       one time grid for all samples, that of the store's config
    condition  as in the store's config; None: unconditional
    save_png   also write the decoded targets to `images/<index>.png`
    announce   is told how many samples are to be solved, before the first one is

    Raises TsAdaptError if an argument is not what the config says, if the test's samples would run into those of
    learning, if another process generates into the same folder, and for whatever goes wrong with a file.
    """
    times = _shared_times(grid)
    _check_arguments(store, times, samples, batch_size, condition, denoiser.noise_schedule)
    if save_png and denoiser.loop is None and denoiser.decoder is None:
        _check_image(store.config["shape"])
    device = _device_of(denoiser)
    ranges = {shard: store.range_of(shard, samples) for shard in store.shards(samples)}
    with store.writing():
        missing = distributed.first(lambda: [shard for shard in ranges if not store.finished(shard, samples)])
        to_do, own = sum(len(ranges[shard]) for shard in missing), distributed.own_share(missing)
        if announce is not None:
            announce(to_do)
        done = samples - to_do
        bar = tqdm(
            total=done + sum(len(ranges[shard]) for shard in own),
            initial=done,
            desc=distributed.label(store.folder.name),
            unit="sample",
            disable=not progress,
        )
        with distributed.together(), bar:
            for shard in own:
                parts = []
                for rows in _batches(ranges[shard], batch_size):
                    parts.append(_solve(denoiser, solver, times, store, rows, condition, device))
                    bar.update(len(rows))
                store.write(shard, {key: torch.cat([part[key] for part in parts]) for key in parts[0]})
        store.gather()
        if save_png:
            with distributed.together():
                for shard in distributed.own_share(list(ranges)):
                    _save_images(denoiser, store, ranges[shard], batch_size, device)


def _solve(
    denoiser: Denoiser,
    solver: Solver,
    times: Tensor,
    store: TeacherStore,
    rows: list[int],
    condition: ConditionSource | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """What a shard keeps of one batch, on the CPU."""
    config = store.manifest["config"]
    kept = condition.draw(config["seed"], rows) if condition is not None else {}
    x_T = store.starting_noise(rows).to(device)
    with torch.no_grad():
        solution = integrate(
            denoiser,
            solver,
            times,
            x_T,
            condition=condition_of({key: value.to(device) for key, value in kept.items()}),
            step_noise=noise_for(config["seed"], rows, x_T) if solver.needs_noise else None,
            keep_trajectory=config["trajectory"],
        )
    part = {"index": torch.tensor(rows), "target": solution.x, **kept}
    if solution.states is not None and solution.x0 is not None:
        part |= {"trajectory": solution.states, "trajectory_x0": solution.x0}
    return {key: value.cpu() for key, value in part.items()}


def _save_images(
    denoiser: Denoiser, store: TeacherStore, index: Sequence[int], batch_size: int, device: torch.device
) -> None:
    """Write the images of these samples that are not there yet."""
    paths = {i: store.folder / image_file(i, digits=6) for i in index}
    missing = [i for i in index if not paths[i].exists()]
    for rows in _batches(missing, batch_size):
        with torch.no_grad():
            kept = store.load(rows, device)
            images = denoiser.decode(kept["target"], condition_of(kept)).float().cpu()
        for i, image in zip(rows, images, strict=True):
            files.write_bytes(paths[i], _png(image), durable=False)


def _png(image: Tensor) -> bytes:
    """An image `(C, H, W)` in [-1, 1], C = 1 or 3, as PNG."""
    from PIL import Image

    _check_image(image.shape)
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def _check_image(shape: Sequence[int]) -> None:
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise TsAdaptError(f"samples of shape {tuple(shape)} are no images; leave save_png out")


def _uniform(seed: int, index: Sequence[int], stream: int) -> Tensor:
    """`(n,)` on 0 .. 1, float64: of each sample its own."""
    drawn: Tensor = torch.special.ndtr(initial_noise(seed, index, (), stream=stream).double())
    return drawn


def _batches(index: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(index), size):
        yield list(index[start : start + size])


def _shared_times(grid: TimeGrid | Tensor) -> Tensor:
    grid = validate_grid(grid)
    if grid.per_sample or grid.corrections:
        raise TsAdaptError("a teacher has one plain time grid (N+1,) for all samples, without corrections")
    return grid.times


def _check_arguments(
    store: TeacherStore,
    times: Tensor,
    samples: int,
    batch_size: int,
    condition: ConditionSource | None,
    noise_schedule: NoiseSchedule,
) -> None:
    config = store.manifest["config"]
    if samples < 1 or batch_size < 1:
        raise TsAdaptError(f"samples is {samples} and batch_size {batch_size}; both are at least 1")
    if TEST_START <= config["first"] < TEST_END < config["first"] + samples:
        raise TsAdaptError(
            f"{samples} test samples from index {config['first']} on run into those of learning, which go on at "
            f"{TEST_END}; at most {TEST_END - config['first']} can be had"
        )
    given = {
        "times": [float(f"{t:.12g}") for t in times.tolist()],
        "noise_scale": float(f"{noise_scale(noise_schedule):.12g}"),
        "batch_size": batch_size,
        "condition": condition.describe() if condition is not None else None,
    }
    for key, value in given.items():
        if config.get(key) != value:
            raise TsAdaptError(
                f"generate was given a {key} that is not the one in the config of {store.folder}; "
                "make the config by teacher_config, from the same arguments"
            )


def _noise_hash(noise_schedule: NoiseSchedule, times: Tensor) -> str:
    return hashlib.sha256(" ".join(f"{v:.9g}" for v in noise_schedule.log_snr(times).tolist()).encode()).hexdigest()


def _device_of(denoiser: Denoiser) -> torch.device:
    network = denoiser.network
    tensor = next(network.parameters(), None) if network is not None else None
    return tensor.device if tensor is not None else torch.device("cpu")
