"""teach, search, train: from a model to its learned schedules.

What is finished is kept, with the options that it was made with. What was made with others is refused, or with `redo`
made anew beside the old one, which is replaced once the new one is complete.

Schedules are learned for the student of the config: the teacher's own network, or that with a cacher and a quantizer.
The teacher stays what it was. By gradient they are learned through what a quantizer passes on (straight-through).

Several processes (`distributed`) share the shards of the teacher, the parts of labels, the trials of blackbox, and the
solvers and NFEs of every other search; they train one predictor together.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial

import torch

from ts_adapt import distributed
from ts_adapt.assembly import steps_of
from ts_adapt.evaluation.records import fingerprint
from ts_adapt.grids.corrections import corrected
from ts_adapt.interfaces import Solver, TsAdaptError, unknown
from ts_adapt.jobs.accelerated import accelerated, check_gradients
from ts_adapt.jobs.experiment import SPLITS
from ts_adapt.jobs.keeping import compared, stays
from ts_adapt.jobs.labelling import search_labels, student_options
from ts_adapt.jobs.searching import search_optimized_grid, search_shared
from ts_adapt.jobs.session import Session, command_for
from ts_adapt.predictors.losses import Labelled
from ts_adapt.predictors.store import PREDICTOR_NAMES, PREDICTORS, save_predictor
from ts_adapt.predictors.training import train_predictor
from ts_adapt.search.optimized import METHODS as OPTIMIZED
from ts_adapt.storage.files import make_folder, read_json, sha256_of_json
from ts_adapt.storage.folders import beside, making, replace_folder
from ts_adapt.storage.layout import ALL, CONFIG, LABELS, checkpoint_file
from ts_adapt.teacher.generate import generate
from ts_adapt.teacher.store import TeacherStore

METHODS = ("static", "per-sample", "blackbox", *OPTIMIZED)
TOGETHER = ("per-sample", "blackbox")
"""The searches at each of which all processes work; of the others each process makes whole ones."""
MOST_VALIDATION = 512
"""Samples that validate a predictor, at most; else the last fifth of its training samples."""


def teach(session: Session, splits: Sequence[str] = ("train", "test"), *, save_png: bool = False) -> None:
    """Generate the teacher's end points for each split; finished shards are kept."""
    options = session.config.teacher
    solver, grid, condition = session.solver(options.solver), session.teacher_grid(), session.condition_source()
    for split in splits:
        if split not in SPLITS:
            raise unknown("split", split, (*SPLITS, "both"))
        samples = options.train_samples if split == "train" else options.test_samples
        folder, config = session.workspace.teacher(split), session.teacher_config(split)
        store = distributed.first(partial(TeacherStore.create, folder, config))
        generate(
            session.denoiser, solver, grid, store,
            samples=samples, batch_size=options.batch_size, condition=condition, save_png=save_png,
            progress=session.progress,
        )  # fmt: skip
        print(f"teacher, {split}: {samples} samples in {store.folder}")


def search(session: Session, method: str, split: str = "train", *, redo: bool = False) -> None:
    """Search schedules for every solver and NFE of the config, on its student.

    redo  replace what was made with other options or does not fit; what was made with these is kept all the same
    """
    config = session.config
    if method not in METHODS:
        raise unknown("search method", method, METHODS)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    with accelerated(session, config.student.cacher, config.student.quantizer):
        if method == "per-sample" or (method == "static" and config.static.method in ("lbfgs", "adam")):
            check_gradients(session)
        cells = [(name, session.solver(name), nfe) for name in config.solvers for nfe in config.nfe]
        for _, solver, nfe in cells:
            steps_of(solver, nfe)
        if method in TOGETHER:
            for name, solver, nfe in cells:
                with distributed.held(_lock(session, method, split, name, nfe)):
                    if method == "per-sample":
                        search_labels(session, name, solver, nfe, split, redo)
                    else:
                        search_shared(session, name, solver, nfe, method, redo)
            return
        with distributed.together():
            for name, solver, nfe in distributed.mine(cells):
                with _lock(session, method, split, name, nfe):
                    if method in OPTIMIZED:
                        search_optimized_grid(session, name, solver, nfe, method, redo)
                    else:
                        search_shared(session, name, solver, nfe, method, redo)


def _lock(session: Session, method: str, split: str, name: str, nfe: int) -> AbstractContextManager[None]:
    """What holds the result of a search against other commands; nothing where many share a storage of trials."""
    config, workspace = session.config, session.workspace
    if method == "blackbox" and config.blackbox.storage is not None:
        return nullcontext()
    if method == "per-sample":
        return making(workspace.labels(corrected(split, config.per_sample.corrections), name, nfe))
    return making(workspace.shared(config.static_name if method == "static" else method, name, nfe))


def train(session: Session, kind: str, *, redo: bool = False) -> None:
    """Train a predictor for every solver and NFE of the config, on its student; `redo` as in `search`.

    kind  of `PREDICTORS`; with `ALL` behind it, one predictor for every solver, which serves all NFEs
    """
    if kind not in PREDICTOR_NAMES:
        raise unknown("predictor", kind, PREDICTOR_NAMES)
    config = session.config
    with accelerated(session, config.student.cacher, config.student.quantizer):
        if config.train.loss != "labels":
            check_gradients(session)
        for name in config.solvers:
            solver = session.solver(name)
            for served in [sorted(config.nfe)] if kind.endswith(ALL) else [[nfe] for nfe in config.nfe]:
                with distributed.held(making(session.workspace.predictor(kind, name, served[0]))):
                    _train_one(session, kind, name, solver, served, redo)


def _train_one(session: Session, kind: str, name: str, solver: Solver, served: list[int], redo: bool) -> None:
    config, steps = session.config, {nfe: steps_of(solver, nfe) for nfe in served}
    folder, logs = (at(kind, name, served[0]) for at in (session.workspace.predictor, session.workspace.curves))
    if stays(folder / CONFIG, lambda: _check_predictor(session, kind, name, served), redo):
        nfes = ", ".join(map(str, served))
        print(f"{kind}, {name}, NFE {nfes}: {folder} is there already, made with these options")
        return
    labels = None
    if config.train.loss != "end_to_end":
        labels = {steps[nfe]: _labels_for(session, name, nfe) for nfe in served}
    store, batch = session.teacher("train", config.train.samples)
    cut = len(batch) - min(max(1, len(batch) // 5), MOST_VALIDATION)
    static = [session.static(name, nfe).grid.times for nfe in served]
    classes = int((store.config["condition"] or {}).get("classes", 0))
    text = batch.condition.get("encoder_hidden_states")
    learned = asdict(config.train), config.derivative, config.derivative_width
    key = fingerprint(store.hash, config.distance, static, *learned, len(batch), *student_options(config))
    checkpoint = checkpoint_file(folder, key)
    torch.manual_seed(config.train.seed)
    predictor = PREDICTORS[kind.removesuffix(ALL)](
        session.noise, static, session.shape, corrections=config.train.corrections, order=solver.order,
        width=config.train.width, hidden=config.train.hidden, classes=classes,
        text=0 if text is None else text.shape[-1],
    ).to(config.model.device)  # fmt: skip
    result = train_predictor(
        predictor, session.objective(solver), batch.rows(slice(0, cut)), batch.rows(slice(cut, None)),
        config.train, make_folder(logs), labels=labels,
        checkpoint=checkpoint, progress=session.progress,
    )  # fmt: skip
    about = {
        "model": config.model.name, "teacher": store.hash, "solver": name, "nfe": served,
        "distance": config.distance, "seed": config.train.seed,
        "labels": None if labels is None else _labels_hashes(session, name, served),
        "made_with": config.made_with(kind),
        "measured": {**asdict(result), "gain": result.gain},
    }  # fmt: skip

    def keep() -> None:
        save_predictor(beside(folder), predictor, about)
        replace_folder(folder, beside(folder))
        checkpoint.unlink(missing_ok=True)

    distributed.first(keep)
    if result.agreement is not None and distributed.rank() == 0:
        print(f"{kind}, {name}: {result.agreement}")
    for nfe in served:
        now, before = result.learned[steps[nfe]], result.static[steps[nfe]]
        print(
            f"{kind}, {name}, NFE {nfe}: validation distance {now:.5f}, "
            f"{compared(now, before)} the static grid's {before:.5f}; {folder}"
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
    then, now = read_json(folder / CONFIG)["labels"], _labels_hashes(session, name, served)
    if then and now and not set(now) <= set(then):
        raise TsAdaptError(f"{folder} was trained on other labels than today's; give --redo to replace it")


def _labels_hashes(session: Session, name: str, served: list[int]) -> list[str] | None:
    """What identifies the training labels of each NFE; None where there are none any more."""
    paths = [session.workspace.labels("train", name, nfe) / LABELS for nfe in served]
    return [sha256_of_json(read_json(path)) for path in paths] if all(path.exists() for path in paths) else None
