"""What a network is trained on: x0 in the space of its diffusion, and the condition of each.

    fashion   the images that the embedded models were trained on, with their classes
    teacher   the teacher's training samples, with the conditions that they were made under: for every model
    a folder  images, with what its metadata.csv says of them: `label`, for models of classes, or `text`

Images of a latent model are encoded once and kept in the workspace. Without a label or a text they are shown under the
condition that stands for none, where the model has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ts_adapt import distributed
from ts_adapt.denoisers.guidance import Guided
from ts_adapt.denoisers.pipeline import LatentDecoder
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.features import read_image
from ts_adapt.interfaces import Condition, Denoiser
from ts_adapt.jobs.session import Session
from ts_adapt.numerics import each_tensor
from ts_adapt.pictures import metadata_of, picture_files
from ts_adapt.storage.files import read_tensors, sha256_of_file, sha256_of_json, sha256_of_tensors, write_tensors
from ts_adapt.storage.folders import making
from ts_adapt.storage.layout import METADATA
from ts_adapt.teacher.generate import class_labels_for
from ts_adapt.zoo.data import load_fashion_mnist, to_model_range

EMBEDDED, TEACHER = "fashion", "teacher"
PART = 32
"""Images, or prompts, that are encoded at once."""
LATENTS = "latents"


def unguided(session: Session) -> Denoiser:
    """The denoiser that the network was trained as."""
    return session.denoiser.denoiser if isinstance(session.denoiser, Guided) else session.denoiser


def training_data(session: Session) -> tuple[Tensor, Condition]:
    """x0 `(n, ...)`, and the conditions `(n, ...)` that go with them.

    Raises TsAdaptError for data that cannot be had or is of another size than the model's, images for a model that
    makes no latents of them, and classes or texts that are not known.
    """
    options = session.config.qat
    if options.data == TEACHER:
        batch = session.teacher("train")[1]
        batch = batch.rows(slice(0, options.images))
        condition = dict(batch.condition)
        if isinstance(session.denoiser, Guided):
            condition.pop("guidance_scale", None)  # which the network itself is not told
        return batch.target, condition
    if options.data == EMBEDDED:
        try:
            pixels, labels = load_fashion_mnist("train", Path(session.config.data_root) / "fashion-mnist")
        except RuntimeError as error:
            raise TsAdaptError(f"{error}; or give a folder of images as --qat.data") from error
        images = to_model_range(pixels[: options.images])
        if tuple(images.shape[1:]) != session.shape:
            raise TsAdaptError(
                f"the images of {options.data} are of {tuple(images.shape[1:])}, the model's samples of "
                f"{session.shape}; give a folder of images, or teacher, as --qat.data"
            )
        return images, _condition(session, len(images), labels=labels[: options.images])
    files = picture_files(options.data)[: options.images]
    return _encoded(session, files), _condition(session, len(files), files)


def _encoded(session: Session, files: Sequence[Path]) -> Tensor:
    """The images in `files`, or their latents, which are kept."""
    decoder, shape = unguided(session).decoder, session.image_shape
    if decoder is None and session.denoiser.loop is None:
        return torch.cat([read_image(file, shape) for file in files])
    if not isinstance(decoder, LatentDecoder):
        raise TsAdaptError(
            f"how images become what the network of {session.config.model.name!r} works on is not known; train it on "
            "the teacher's samples, --qat.data teacher"
        )
    made_of = [list(shape), sha256_of_tensors(decoder.state_dict()), *map(sha256_of_file, files)]
    path = session.workspace.latents(sha256_of_json([*made_of, decoder.scaling, decoder.shift])[:16])

    def make() -> None:
        with making(path):
            if path.exists():
                return
            parts = [files[i : i + PART] for i in range(0, len(files), PART)]
            bar = tqdm(parts, desc="encoding images", disable=not session.progress, leave=False)
            device = session.config.model.device
            images = (torch.cat([read_image(file, shape) for file in part]).to(device) for part in bar)
            write_tensors(path, {LATENTS: torch.cat([decoder.encode(part).cpu() for part in images])})

    distributed.first(make)
    return read_tensors(path, {LATENTS: (len(files), *session.shape)})[LATENTS]


def _condition(
    session: Session, count: int, files: Sequence[Path] = (), labels: Tensor | None = None
) -> dict[str, Any]:
    """The condition of `count` images: of these `labels`, or as is said of them beside the `files`."""
    denoiser, folder = unguided(session), session.config.qat.data
    null, classes = denoiser.null_condition or {}, class_labels_for(denoiser)
    if denoiser.encode is not None:
        texts = metadata_of(folder, "text", files) if files else None
        if texts is not None:
            parts = [denoiser.encode(texts[i : i + PART]) for i in range(0, count, PART)]
            return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
    elif classes is None:
        return {}
    elif labels is None and files:
        said = metadata_of(folder, "label", files)
        labels = None if said is None else torch.tensor([_class(value, classes.classes) for value in said])
    if labels is not None and denoiser.encode is None:
        return {"class_labels": labels}
    if not null:
        wanted = "class" if denoiser.encode is None else "text"
        raise TsAdaptError(
            f"the model {session.config.model.name!r} wants the {wanted} of each image, which is not known of "
            f"{folder}; say it in a {METADATA} there, or give --qat.data teacher"
        )
    whole: dict[str, Any] = each_tensor(
        {name: torch.as_tensor(value) for name, value in null.items()}, lambda value: _repeated(value, count)
    )
    return whole


def _repeated(none: Tensor, count: int) -> Tensor:
    """What stands for no condition, a number or `(1, ...)`, for `count` images."""
    return none.cpu().expand(count, *none.shape[1:])


def _class(text: str, classes: int) -> int:
    if not text.strip().isdecimal() or int(text) >= classes:
        raise TsAdaptError(f"{METADATA} says label {text!r}; this model has classes 0 to {classes - 1}")
    return int(text)
