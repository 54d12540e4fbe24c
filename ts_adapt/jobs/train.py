"""train: a predictor for each solver and NFE of the config, or one for all NFEs, kept with the options that made it.

What was made with other options is refused, or with `redo` made anew beside the old one, which is replaced once the new
one is complete. What one for all NFEs keeps between them is chosen at the end of its training, and where one is there
without, by itself. Several processes (`distributed`) train one predictor together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ts_adapt import distributed
from ts_adapt.assembly import steps_of
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.records import fingerprint
from ts_adapt.grids.corrections import PICTURES
from ts_adapt.interfaces import EMBEDDING, RESIDUAL, START, Solver, TimeGrid
from ts_adapt.jobs.cheaper_network import cheaper_network, check_gradients
from ts_adapt.jobs.minimised import minimised_said
from ts_adapt.jobs.session import Session, command_for, paired_verdict, stays
from ts_adapt.jobs.tracking import board
from ts_adapt.predictors.losses import Labelled
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.predictors.store import PREDICTORS, save_predictor
from ts_adapt.predictors.training import TrainResult, as_numbers, choose_kept, choosing, compared_in, train_predictor
from ts_adapt.search.work import Work
from ts_adapt.storage.files import make_folder, read_json, sha256_of_json, write_json
from ts_adapt.storage.folders import beside, making, replace_folder
from ts_adapt.storage.layout import ALL, CONFIG, LABELS, checkpoint_file
from ts_adapt.teacher.generate import classes_of


def train(session: Session, kind: str, *, redo: bool = False) -> None:
    """Train a predictor for every solver and NFE of the config, on its student; `redo` as in `search`.

    kind  of `PREDICTORS`; with `ALL` behind it, one predictor for every solver, which serves all NFEs
    """
    config = session.config
    session.check(caption=config.train.caption)
    check_predicted(session, [kind])
    with cheaper_network(session, config.student):
        if config.train.loss != "labels":
            check_gradients(session)
        for name in config.solvers:
            solver = session.solver(name)
            for served in [sorted(config.nfe)] if kind.endswith(ALL) else [[nfe] for nfe in config.nfe]:
                with distributed.held(making(session.workspace.predictor(kind, name, served[0]))):
                    _train_one(session, kind, name, solver, served, redo)


def check_predicted(session: Session, kinds: Iterable[str]) -> None:
    """TsAdaptError where each sample's times cannot be told, where changes of pictures are to be learned and states are
    none, there are labels alone, or one of `kinds` has no such change, where labels alone are to lower a loss beside
    the distance, and where predictors are to know the scale of guidance, and are not told."""
    config = session.config
    config.train.check_beside()
    session.check_told("a predictor")
    pictures = [name for name in config.train.corrections or () if name in PICTURES]
    if pictures and session.seen_shape != session.shape:
        raise TsAdaptError(
            f"train.corrections has {pictures[0]}, a change of pictures, and {config.model.name} has samples of shape "
            f"{session.shape} that are none; leave it out"
        )
    if pictures and config.train.loss == "labels":
        raise TsAdaptError(
            f"train.corrections has {pictures[0]}, and labels teach times alone; leave it out, or set train.loss to "
            "end_to_end or both"
        )
    once = [kind for kind in kinds if not PREDICTORS[kind.removesuffix(ALL)].every_step]
    if once and RESIDUAL.name in pictures:
        raise TsAdaptError(
            f"train.corrections has {RESIDUAL.name}, and a {once[0]} predictor is asked once; take {START.name}, or "
            "train recursive"
        )
    if not isinstance(config.guidance, list):
        return
    _, x_T, condition = session.training_noises(1)
    if "guidance_scale" not in session.denoiser.shown(x_T, condition)[1]:
        raise TsAdaptError(
            f"option guidance is a range, and the pipeline of {config.model.name!r} does not say with which scale it "
            "is called, so that no predictor can be told; give one number, or learn grids alone, --learn static"
        )


def new_predictor(
    session: Session, kind: str, static: list[TimeGrid], order: int, corrections: Sequence[str]
) -> OneShot | Recursive:
    """An untrained predictor of the config's size, for what the teacher's samples have: classes, texts, scales of
    guidance."""
    config, source, (_, x_T, condition) = session.config, session.condition_source(), session.training_noises(1)
    text = session.denoiser.shown(x_T, condition)[1].get("encoder_hidden_states")
    predictor: OneShot | Recursive = PREDICTORS[kind](
        session.noise_schedule, static, session.seen_shape, corrections=corrections, order=order,
        width=config.train.width, hidden=config.train.hidden,
        classes=classes_of(None if source is None else source.describe()), text=0 if text is None else text.shape[-1],
        scales=config.guidance if isinstance(config.guidance, list) else None,
        embedding=session.embedding_width if EMBEDDING.name in corrections else 0,
    ).to(config.model.device)  # fmt: skip
    return predictor


def _train_one(session: Session, kind: str, name: str, solver: Solver, served: list[int], redo: bool) -> None:
    config, steps = session.config, {nfe: steps_of(solver, nfe) for nfe in served}
    folder, logs = (at(kind, name, served[0]) for at in (session.workspace.predictor, session.workspace.curves))
    called, nfes = f"{kind}, {name}", ", ".join(map(str, served))
    if stays(folder / CONFIG, lambda: _check_predictor(session, kind, name, served), redo):
        print(f"{called}, NFE {nfes}: {folder} is there already, made with these options")
        _choose_kept(session, kind, name, solver, served[0])
        return
    labels = None
    if config.train.loss != "end_to_end":
        labels = {steps[nfe]: _labels_for(session, name, nfe) for nfe in served}
    store, batch = session.teacher("train", config.train.samples)
    cut = len(batch) - config.train.validating
    base = session.base
    static = [session.shared(base, name, nfe).grid for nfe in served]
    made_with, hashes = session.made_with(kind), None if labels is None else _labels_hashes(session, name, served)
    key = fingerprint(store.hash, session.distance, list(map(as_numbers, static)), _given(made_with), hashes)
    checkpoint, corrections = checkpoint_file(folder, key), session.corrections_of(kind.removesuffix(ALL))
    torch.manual_seed(config.train.seed)
    predictor = new_predictor(session, kind.removesuffix(ALL), static, solver.order, corrections)
    session.announce(f"{called}, NFE {nfes}", training_work(session, name, served))
    if distributed.rank() == 0:
        with board(config, f"train {kind}", logs):
            pass
    derivatives = session.derivatives(store.hash, name, compared_in(steps.values()), cut)
    result = train_predictor(
        predictor, session.objective(solver), batch.rows(slice(0, cut)), batch.rows(slice(cut, None)),
        config.train, make_folder(logs), labels=labels, checkpoint=checkpoint,
        derivatives=derivatives, progress=session.progress, **session.learned_beside(config.train),
    )  # fmt: skip
    about = {
        "model": config.model.name, **session.guided_by, "teacher": store.hash, "solver": name, "nfe": served,
        "distance": session.distance, "seed": config.train.seed, "base": base,
        "labels": hashes, "made_with": made_with,
        "measured": {
            "static": result.static, "learned": result.learned, "epochs": result.epochs, "gain": result.gain,
            "agreement": None if result.agreement is None else asdict(result.agreement),
        },
    }  # fmt: skip

    def keep() -> None:
        save_predictor(beside(folder), predictor, about)
        replace_folder(folder, beside(folder))
        checkpoint.unlink(missing_ok=True)

    distributed.first(keep)
    _say_trained(session, called, steps, predictor, result, folder)


def _say_trained(
    session: Session, called: str, steps: Mapping[int, int], predictor: OneShot | Recursive, result: TrainResult,
    folder: Path,
) -> None:  # fmt: skip
    """Say what was minimised, and what the predictor in `folder` gained by it.

    steps  NFE -> the number of steps
    """
    options = session.config.train
    if result.agreement is not None and distributed.rank() == 0:
        print(f"{called}: {result.agreement}")
    for line in minimised_said(session, options):
        print(f"{called}: {line}")
    for nfe, count in steps.items():
        now, before = result.learned[count], result.static[count]
        print(
            f"{called}, NFE {nfe}: validation distance {now:.5f}, the {session.base} grid's {before:.5f}: "
            f"{paired_verdict(*result.apart[count])}; {folder}"
        )
        if now >= before:
            print(
                f"{called}, NFE {nfe}: it stayed the {session.base} grid, as it gained no more than chance on "
                f"{options.validating} validation samples; more train.samples (now {options.samples}) or train.epochs "
                f"(now {options.epochs}) may help"
            )
    if between := sorted({*result.apart} - {*result.learned}):
        every = sorted(result.apart)
        print(f"{called}: it serves every number of steps from {every[0]} to {every[-1]}")
    _say_kept(called, predictor, {each: result.apart[each] for each in between})


def training_work(session: Session, solver: str, served: Sequence[int]) -> Work:
    """About how many evaluations the training of one predictor for the NFEs `served` takes: that of a derivative, and
    what it chooses between them, included."""
    options, each = session.config.train, session.solver(solver).evaluations_per_step
    learned, cut = [nfe // each for nfe in sorted(served)], options.samples - options.validating
    work = options.solves(cut, options.validating).times(sum(served))
    if options.loss != "labels":
        steps = compared_in(learned)
        work += session.comparing(solver, steps, cut).times(steps * each)
    return work + choosing(learned, options.validating).times(each)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options`, nested, without those that are None: a new one that is not given throws no training away."""
    given = {name: value for name, value in options.items() if value is not None}
    return {name: _given(value) if isinstance(value, Mapping) else value for name, value in given.items()}


def _choose_kept(session: Session, kind: str, name: str, solver: Solver, nfe: int) -> None:
    """Choose what the workspace's predictor keeps between the NFEs that it was trained for, where it was made without;
    on the validation samples of its training."""
    folder, predictor = session.workspace.predictor(kind, name, nfe), session.predictor(kind, name, nfe).predictor
    if not predictor.without_k:
        return
    options, (_, batch) = session.config.train, session.teacher("train", session.config.train.samples)
    validation = batch.rows(slice(len(batch) - options.validating, None))
    work = choosing(predictor.learned, len(validation)).times(solver.evaluations_per_step)
    session.announce(f"{kind}, {name}, between", work)
    found = choose_kept(
        predictor, session.objective(solver), validation, options,
        real=session.real_images if options.distribution else None,
        captions=session.captions if options.caption else None,
    )  # fmt: skip
    config = {**read_json(folder / CONFIG), "network": predictor.options}
    distributed.first(partial(write_json, folder / CONFIG, config))
    _say_kept(f"{kind}, {name}", predictor, found)


def _say_kept(
    called: str, predictor: OneShot | Recursive, found: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Say what is kept at numbers of steps that were not trained for, and what that gains."""
    for steps, distances in found.items():
        share = 100 * sum(share for _, share in predictor.near(steps))
        print(
            f"{called}, {steps} steps, not trained for: {share:.0f} % of what is interpolated; beside "
            f"the interpolated grid {paired_verdict(*distances)}"
        )


def _labels_for(session: Session, name: str, nfe: int) -> Labelled:
    """The first `label_samples` labels of the training split; TsAdaptError where there are fewer."""
    labels, wanted = session.labelled("train", name, nfe), session.config.label_samples
    if len(labels.batch) < wanted:
        raise TsAdaptError(
            f"{len(labels.batch)} of {wanted} training samples have labels for {name}, NFE {nfe}; "
            f"search the others with {command_for('per-sample', name, nfe)}, or lower label_samples"
        )
    return labels.rows(slice(0, wanted))


def _check_predictor(session: Session, kind: str, name: str, served: list[int]) -> None:
    """TsAdaptError unless the workspace's predictor was trained with the config's options, on the labels of today."""
    for nfe in served:
        session.predictor(kind, name, nfe, strict=True)
    folder = session.workspace.predictor(kind, name, served[0])
    kept = read_json(folder / CONFIG)
    if kept["base"] != session.base:
        raise TsAdaptError(f"{folder} begins at {kept['base']}, not at {session.base}; give --redo to replace it")
    then, now = kept["labels"], _labels_hashes(session, name, served)
    if then and now and not set(now) <= set(then):
        raise TsAdaptError(f"{folder} was trained on other labels than today's; give --redo to replace it")


def _labels_hashes(session: Session, name: str, served: list[int]) -> list[str] | None:
    """What identifies the training labels of each NFE; None where there are none any more."""
    paths = [session.workspace.labels("train", name, nfe) / LABELS for nfe in served]
    return [sha256_of_json(read_json(path)) for path in paths] if all(path.exists() for path in paths) else None
