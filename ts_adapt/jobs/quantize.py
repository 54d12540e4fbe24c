"""quantize: a quantizer calibrated or trained on the network of the config, kept for whoever samples with it.

It is read there by evaluate, search and train; beside it lies what it does to every layer, as a table and drawn.

Quantizers with +qat behind their name are trained on `training_data`, by the diffusion loss or by the network in full
precision. Under accelerate's launcher all processes train, and the first writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from ts_adapt import distributed
from ts_adapt.assembly import NONE, Quantizing, StudentOptions, build_quantizer
from ts_adapt.denoisers.network import NetworkDenoiser
from ts_adapt.errors import TsAdaptError
from ts_adapt.jobs.cheaper_network import calibration_set, cheaper_network, folder_of, load_or_make, quantize_anew
from ts_adapt.jobs.session import Session
from ts_adapt.jobs.tracking import board
from ts_adapt.jobs.training_data import training_data, unguided
from ts_adapt.quantizers.quantization import restore, size_of
from ts_adapt.quantizers.report import LayerReport, plot, report, save_report, write_table
from ts_adapt.quantizers.training import (
    FineTuneOptions,
    diffusion_loss,
    fine_tune,
    image_batches,
    plain_copy,
    teacher_loss,
)
from ts_adapt.storage.folders import making
from ts_adapt.storage.layout import LAYERS_PICTURE, LAYERS_REPORT, LAYERS_TABLE, checkpoint_file


def quantize(session: Session, name: str | None = None, *, redo: bool = False) -> None:
    """Make the quantizer called `name`, or every one of the config; what is there already stays, but for `redo`.

    Of a student that is pruned the network without these blocks is quantized.

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
    student = StudentOptions(config.student.pruned)
    with cheaper_network(session, student):
        for one in names:
            quantizing = build_quantizer(one)
            if quantizing is not None:
                _quantize(session, network, replace(student, quantizer=one), quantizing, redo)


def _quantize(
    session: Session, network: nn.Module, student: StudentOptions, quantizing: Quantizing, redo: bool
) -> None:
    name, folder = student.quantizer, folder_of(session, student, quantizing)
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
    options, denoiser = session.config.qat, unguided(session)
    if options.loss == "diffusion" and not isinstance(denoiser, NetworkDenoiser):
        raise TsAdaptError(
            f"what the network of {session.config.model.name!r} predicts is known to its pipeline alone; train it "
            "towards the network in full precision, --qat.loss teacher"
        )
    x0, condition = training_data(session)
    batches = image_batches(
        x0, options.batch_size, condition=condition, null=denoiser.null_condition, dropout=options.dropout,
        seed=options.seed,
    )  # fmt: skip
    loss = (
        diffusion_loss(denoiser, options.norm)
        if isinstance(denoiser, NetworkDenoiser) and options.loss == "diffusion"
        else teacher_loss(denoiser, plain_copy(network), options.norm)
    )
    how = FineTuneOptions(
        options.steps, options.lr, warm_up=options.warm_up, schedule=options.schedule, ema=options.ema,
        checkpoint_every=options.checkpoint_every, seed=options.seed,
    )  # fmt: skip

    def train() -> None:
        logs = session.workspace.tensorboard("quantize", name)
        if distributed.rank() == 0:
            with board(session.config, f"quantize {name}", logs):
                pass
        fine_tune(network, batches, loss, how, checkpoint=checkpoint, tensorboard=logs, progress=session.progress)

    return train


def _said(name: str, rows: Sequence[LayerReport], network: nn.Module, folder: Path, was_there: bool) -> str:
    size, quantized = size_of(network), [row for row in rows if row.reason is None]
    kept = len(rows) - len(quantized)
    worst = max(quantized, key=lambda row: row.weight_relative)
    return (
        f"{name}: {size.bits:.2f} bits a weight in {len(quantized)} layers, {kept} in full precision; "
        f"{size.weight_bytes / 1e6:.2f} MB of {size.full_bytes / 1e6:.2f}; the largest relative error of a weight is "
        f"{worst.weight_relative:.2g}, of {worst.name}; {folder}{', was there already' if was_there else ''}"
    )
