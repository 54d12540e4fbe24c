"""sample: images along any schedule, as files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Solver, StepPolicy, TimeGrid
from ts_adapt.jobs.cheaper_network import cheaper_network
from ts_adapt.jobs.other_steps import policy_at
from ts_adapt.jobs.session import Session
from ts_adapt.sampling import initial_noise, integrate, noise_for, noise_scale
from ts_adapt.schedules.resolve import resolve
from ts_adapt.storage.files import make_folder, write_bytes
from ts_adapt.storage.layout import CONTACT_SHEET, IMAGES, image_file
from ts_adapt.teacher.store import condition_of

MAX_SHOWN = 256
"""How many images the grid shows."""
SHOWN_SIDE = 128
"""Pixels up to which smaller images are enlarged in the grid, by a whole factor."""


def sample(
    session: Session, chosen: TimeGrid | StepPolicy, method: Solver, index: Sequence[int], seed: int,
    label: int | None = None, texts: Sequence[str] = (), scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The images of the samples `index` in [-1, 1] along the schedule `chosen`, by the solver `method`.

    Without a label the classes of a class-conditional model are drawn; prompts are the config's unless there are
    `texts`, and scales of guidance are, unless there is one `scale`. A sample depends on (seed, its index) only.
    """
    source = session.conditions(label, texts=texts, scale=scale)
    x_T = initial_noise(seed, index, session.shape) * noise_scale(session.noise_schedule)
    x_T = x_T.to(session.config.model.device)
    drawn = source.draw(seed, index) if source is not None else {}
    condition = condition_of({key: value.to(x_T.device) for key, value in drawn.items()})
    with torch.inference_mode():
        end = integrate(
            session.denoiser, method, chosen, x_T, condition=condition,
            step_noise=noise_for(seed, index, x_T) if method.needs_noise else None,
        ).x  # fmt: skip
        return session.denoiser.decode(end, condition)


def sample_to_folder(
    session: Session, schedule: str, solver: str | None, nfe: int | None, count: int, seed: int, label: int | None,
    out: str | None, batch: int | None = None, texts: Sequence[str] = (), scale: float | None = None,
) -> Path:  # fmt: skip
    """`count` images of the student as PNG files and one grid of the first of them; returns the folder.

    schedule     a name, as `schedules.resolve` has them
    solver, nfe  None: the schedule's own, or the first of the config; for an NFE that was not learned a grid is made of
                 those that were (`other_steps`)
    batch        images at a time; None: the config's `evaluate.batch_size`
    texts        prompts in turn, image by image; none: the config's
    scale        of guidance, of all; None: the config's, of a range each its own
    """
    found, config = resolve(schedule, session), session.config
    name, taken, others = found.choose(solver, nfe, config, unlearned=True)
    policy, method = policy_at(session, found, name, taken, scale), session.solver(name)
    folder = Path(out) if out else session.workspace.samples(found.called, name, taken)
    check_folder(folder, count)

    def make(index: range) -> Tensor:
        return (sample(session, policy, method, index, seed, label, texts, scale).float().clamp(-1, 1) + 1) / 2

    with cheaper_network(session, config.student):
        write_images(folder, make, count, batch or config.evaluate.batch_size, progress=session.progress)
    print(f"{count} images along {schedule}, {name}, NFE {taken}{others}: {folder}")
    return folder


def check_folder(folder: Path, count: int) -> None:
    """TsAdaptError unless `folder` is a new one, or holds nothing but what `count` images will replace: images beyond
    them only beside the contact sheet, by which they are known to be of an earlier `write_images`."""
    there = [path for place in (folder, folder / IMAGES) if place.is_dir() for path in place.glob("[!.]*")]
    images = _images_in(folder) if (folder / CONTACT_SHEET).exists() else _images_in(folder, count)
    ours = {folder / CONTACT_SHEET, folder / IMAGES, *images}
    other = next((path for path in sorted(there) if path not in ours), None)
    if other is not None:
        raise TsAdaptError(f"{folder} holds {other.relative_to(folder)} already; give a folder of its own with --out")


def _images_in(folder: Path, count: float = math.inf, *, first: int = 0) -> list[Path]:
    """What is under `folder` of its images first .. count - 1, by their names."""
    numbered = [(int(path.stem), path) for path in (folder / IMAGES).glob("*.png") if path.stem.isdecimal()]
    return [path for number, path in numbered if first <= number < count and path == folder / image_file(number)]


def write_images(
    folder: Path, make: Callable[[range], Tensor], count: int, batch: int, *, progress: bool = True
) -> None:
    """The images 0 .. count - 1 as `images/<number>.png` under `folder`, and the first of them as `grid.png`; what an
    earlier call left there beyond them is removed.

    make  the numbers of a batch -> its images `(n, C, H, W)` in [0, 1]
    """
    make_folder(folder / IMAGES)
    bar = tqdm(total=count, desc="sample", unit="image", disable=not progress, leave=False)
    shown = []
    with bar:
        for start in range(0, count, batch):
            index = range(start, min(start + batch, count))
            pictures = make(index)
            for number, picture in zip(index, pictures, strict=True):
                _save_png(picture, folder / image_file(number))
            shown.append(pictures[: max(0, MAX_SHOWN - start)].cpu())
            bar.update(len(index))
    for path in _images_in(folder, first=count):
        path.unlink()
    pictures = torch.cat(shown)
    factor = max(1, SHOWN_SIDE // max(pictures.shape[-2:]))
    pictures = pictures.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    columns = max(1, round(len(pictures) ** 0.5))
    _save_png(make_grid(pictures, nrow=columns, padding=2, pad_value=1.0), folder / CONTACT_SHEET)


def _save_png(picture: Tensor, path: Path) -> None:
    buffer = io.BytesIO()
    save_image(picture, buffer, format="png")
    write_bytes(path, buffer.getvalue(), durable=False)
