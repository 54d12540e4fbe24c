"""quantize: a quantizer calibrated or trained on the network of the config, kept for whoever samples with it.

It is read there by evaluate, search and train; beside it lies what it does to every layer, as a table and drawn.

Quantizers with +qat behind their name are trained: on the images that the network was trained on, or on a folder of
images, by the diffusion loss or by the network in full precision. Under accelerate's launcher all processes train, and
the first writes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt import distributed
from ts_adapt.assembly import NONE, Quantizing, build_quantizer
from ts_adapt.denoisers.guidance import Guided
from ts_adapt.evaluation.features import read_image
from ts_adapt.interfaces import TsAdaptError
from ts_adapt.jobs.cheaper_network import calibration_set, folder_of, load_or_make, quantize_anew
from ts_adapt.jobs.session import Session
from ts_adapt.jobs.tracking import board
from ts_adapt.pictures import picture_files
from ts_adapt.quantizers.quantization import restore, size_of
from ts_adapt.quantizers.report import LayerReport, plot, report, save_report, write_table
from ts_adapt.quantizers.training import FineTuneOptions, diffusion_loss, fine_tune, image_batches, teacher_loss
from ts_adapt.sampling import generator_for
from ts_adapt.storage.folders import making
from ts_adapt.storage.layout import LAYERS_PICTURE, LAYERS_REPORT, LAYERS_TABLE, checkpoint_file
from ts_adapt.zoo.data import load_fashion_mnist, to_model_range

EMBEDDED = "fashion"
WITHOUT_CLASS = 0.1
"""The share of the images that a class-conditional network with a null class is shown without their class."""


def quantize(session: Session, name: str | None = None, *, redo: bool = False) -> None:
    """Make the quantizer called `name`, or every one of the config; what is there already stays, but for `redo`.

    Raises TsAdaptError for a model without a network, where no quantizer is asked for, and as the quantizers do.
    """
    config = session.config
    asked = [name] if name is not None else [*config.quantizers, config.student.quantizer]
    names = [one for one in dict.fromkeys(asked) if one != NONE]
    if not names:
        raise TsAdaptError("no quantizer is asked for; name one with --quantizer, such as hqq4 or tdq-w4a8+qat")
    network = session.denoiser.network
    if network is None:
        raise TsAdaptError(f"the model {config.model.name!r} has no network to quantize")
    for one in names:
        quantizing = build_quantizer(one)
        if quantizing is not None:
            _quantize(session, network, one, quantizing, redo)


def training_images(session: Session) -> tuple[Tensor, dict[str, Tensor]]:
    """What is trained on: images `(n, C, H, W)` in [-1, 1], and the conditions `(n,)` that go with them.

    Raises TsAdaptError for a model of latents or of text, data that cannot be had or is of another size than the
    model's samples, and classes that are not known.
    """
    options, denoiser, shape = session.config.qat, session.denoiser, session.shape
    if denoiser.decoder is not None or denoiser.loop is not None:
        raise TsAdaptError(
            f"the model {session.config.model.name!r} works on latents, and training is on images; take a quantizer "
            "without +qat"
        )
    labels = None
    if options.data == EMBEDDED:
        try:
            pixels, labels = load_fashion_mnist("train", Path(session.config.data_root) / "fashion-mnist")
        except RuntimeError as error:
            raise TsAdaptError(f"{error}; or give a folder of images as --qat.data") from error
        images = to_model_range(pixels[: options.images])
        if tuple(images.shape[1:]) != shape:
            raise TsAdaptError(
                f"the images of {options.data} are of {tuple(images.shape[1:])}, the model's samples of {shape}; give "
                "a folder of images as --qat.data"
            )
    else:
        images = torch.cat([read_image(file, shape) for file in picture_files(options.data)[: options.images]])
    return images, _classes(session, None if labels is None else labels[: options.images], len(images))


def _classes(session: Session, labels: Tensor | None, count: int) -> dict[str, Tensor]:
    """The condition of `count` images of these `labels`; without labels all are shown as images of no class."""
    source, null = session.condition_source(), session.denoiser.null_condition or {}
    if source is None:
        return {}
    kind, nothing = source.describe()["kind"], null.get("class_labels")
    if kind == "class_labels" and nothing is not None:
        none = torch.full((count,), int(nothing))
        hidden = torch.rand(count, generator=generator_for(session.config.qat.seed, 0, stream=4)) < WITHOUT_CLASS
        return {"class_labels": none if labels is None else torch.where(hidden, none, labels)}
    if kind == "class_labels" and labels is not None:
        return {"class_labels": labels}
    raise TsAdaptError(
        f"the model {session.config.model.name!r} wants {kind.replace('_', ' ')}, which the images do not have; take a "
        "quantizer without +qat"
    )


def _quantize(session: Session, network: nn.Module, name: str, quantizing: Quantizing, redo: bool) -> None:
    folder = folder_of(session, name, quantizing)
    checkpoint, calls = checkpoint_file(folder), calibration_set(session, quantizing.select)

    def make() -> None:
        quantize_anew(session, network, quantizing, calls, trainer(session, network, name, quantizing, checkpoint))

    def tell() -> None:
        if not was_there:
            checkpoint.unlink(missing_ok=True)
        rows = report(network, calls)
        save_report(rows, network, folder / LAYERS_REPORT)
        write_table(rows, folder / LAYERS_TABLE)
        plot(rows, name).savefig(folder / LAYERS_PICTURE, dpi=150)
        print(_said(name, rows, network, folder, was_there))

    with distributed.held(making(folder)):
        was_there = load_or_make(network, folder, make, redo=redo)
        try:
            distributed.first(tell)
        finally:
            restore(network)


def trainer(
    session: Session, network: nn.Module, name: str, quantizing: Quantizing, checkpoint: Path
) -> Callable[[], None] | None:
    """What trains `network`, in full precision now, once it is quantized; None for a quantizer that is not trained.

    checkpoint  the file from which a training that was interrupted goes on
    """
    if not quantizing.method.needs_training:
        return None
    options, denoiser = session.config.qat, _unguided(session)
    images, condition = training_images(session)
    batches = image_batches(images, options.batch_size, condition=condition, seed=options.seed)
    teacher = copy.deepcopy(network) if options.loss == "teacher" else None
    loss = diffusion_loss(denoiser) if teacher is None else teacher_loss(denoiser, teacher)
    how = FineTuneOptions(options.steps, options.lr, checkpoint_every=options.checkpoint_every, seed=options.seed)

    def train() -> None:
        logs = session.workspace.tensorboard("quantize", name)
        if distributed.rank() == 0:
            with board(session.config, f"quantize {name}", logs):
                pass
        fine_tune(network, batches, loss, how, checkpoint=checkpoint, tensorboard=logs, progress=session.progress)

    return train


def _unguided(session: Session) -> Any:
    """The denoiser that the network was trained as."""
    return session.denoiser.denoiser if isinstance(session.denoiser, Guided) else session.denoiser


def _said(name: str, rows: Sequence[LayerReport], network: nn.Module, folder: Path, was_there: bool) -> str:
    size, quantized = size_of(network), [row for row in rows if row.reason is None]
    kept = len(rows) - len(quantized)
    worst = max(quantized, key=lambda row: row.weight_relative)
    return (
        f"{name}: {size.bits:.2f} bits a weight in {len(quantized)} layers, {kept} in full precision; "
        f"{size.weight_bytes / 1e6:.2f} MB of {size.full_bytes / 1e6:.2f}; the largest relative error of a weight is "
        f"{worst.weight_relative:.2g}, of {worst.name}; {folder}{', was there already' if was_there else ''}"
    )
