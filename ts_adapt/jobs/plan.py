"""What learning takes, said before it begins: evaluations of the network from the options, time from a first few.

evaluations   one of one sample, guided or not; with a gradient they are counted apart
of a search   as many as it makes where it does not end early, of what is missing yet
seconds       (per evaluation without gradient, with one), measured on a solve of a few samples
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from ts_adapt.assembly import steps_of
from ts_adapt.config import Config
from ts_adapt.grids.corrections import corrected
from ts_adapt.interfaces import TimeGrid, TsAdaptError
from ts_adapt.jobs import converged
from ts_adapt.jobs.labels import label_options
from ts_adapt.jobs.search import shared_solves
from ts_adapt.jobs.session import Session, recorded, stays
from ts_adapt.numerics import tensors_in
from ts_adapt.predictors.store import load_predictor, nfes_of
from ts_adapt.predictors.training import choosing
from ts_adapt.schedules.file import LearnedGrid
from ts_adapt.schedules.name import ORACLE, PREDICTOR, Name
from ts_adapt.search.labels import LabelStore
from ts_adapt.search.objective import Batch
from ts_adapt.search.work import SLOWER, Work
from ts_adapt.storage.files import read_json
from ts_adapt.storage.layout import ALL, CONFIG, LABELS, MANIFEST
from ts_adapt.teacher.store import TeacherStore

FEW = 8
"""Samples that are timed."""
QUICK = 0.1
"""Seconds of their solves, below which a whole batch is."""
FIXED = 8
"""Fixed grids that a search, or an evaluation, looks at, about."""


def of_teacher(session: Session) -> Work:
    """The samples that the teacher has not yet made, and those by which it is checked."""
    options, missing = session.config.teacher, 0
    for split, wanted in (("train", options.train_samples), ("test", options.test_samples)):
        folder = session.workspace.teacher(split)
        made = len(TeacherStore.open(folder).indices) if (folder / MANIFEST).exists() else 0
        missing += max(0, wanted - made)
    checking = Work() if converged.of_teacher(session) else converged.work(session)
    return Work(plain=missing * options.nfe) + checking


def of_result(session: Session, name: Name, split: str = "test", *, redo: bool = False) -> Work:
    """What `name` stands for, for those solvers and NFEs for which it is missing; `split` of grids of samples.

    redo  what was made with other options is made again; without it TsAdaptError
    """
    config, work = session.config, Work()
    for solver in config.solvers:
        missing = [nfe for nfe in config.nfe if not _is_there(session, name, split, solver, nfe, redo)]
        missing = config.nfe if missing and str(name).endswith(ALL) else missing  # one network, trained for all
        work += _solves(config, name, split).times(sum(missing))
        if str(name).endswith(ALL):
            learned = [session.steps(solver, nfe) for nfe in missing] or _left_open(session, str(name), solver)
            each = session.solver(solver).evaluations_per_step
            work += choosing(learned, config.train.validating).times(each)
    return work


def _left_open(session: Session, name: str, solver: str) -> Sequence[int]:
    """The numbers of steps that the workspace's predictor was trained for, where it has yet to choose what it keeps
    between them; else none."""
    folder = session.workspace.predictor(name, solver, session.config.nfe[0])
    predictor, _ = load_predictor(folder, session.noise_schedule)
    return predictor.learned if predictor.without_k else ()


def of_evaluation(config: Config, learned: int) -> Work:
    """Fixed grids and `learned` schedules on the test noises."""
    grids = FIXED if config.evaluate.grids is None else len(config.evaluate.grids)
    ways = len(config.solvers) * len(config.students)
    return Work(plain=sum(config.nfe) * config.evaluate.samples * ways * (grids + learned))


def _is_there(session: Session, name: Name, split: str, solver: str, nfe: int, redo: bool) -> bool:
    at = session.workspace
    if name.kind == ORACLE:
        folder = at.labels(corrected(split, name.corrections), solver, nfe)
        return stays(folder / LABELS, lambda: LabelStore.open(folder).compare(label_options(session.config)), redo)
    learned = name.kind == PREDICTOR
    path = at.predictor(str(name), solver, nfe) / CONFIG if learned else at.shared(str(name), solver, nfe)

    def check() -> None:
        about = read_json(path, {}) if learned else LearnedGrid.load(path, session.noise_schedule).about
        if learned and nfe not in (known := nfes_of(about)):
            of = ", ".join(map(str, known))
            session.check_fit(path.parent, about.get("solver"), of, session.steps(solver, nfe), wanted=(solver, nfe))
        session.check_options(path, recorded(about), str(name), strict=True)

    return stays(path, check, redo)


def _solves(config: Config, name: Name, split: str) -> Work:
    """The few-step solves of one search or training."""
    if name.kind == PREDICTOR:
        return config.train.solves(config.train.samples - config.train.validating, config.train.validating)
    if name.kind == ORACLE:
        return config.per_sample.solves.times(config.oracle_samples if split == "test" else config.label_samples)
    if name.base in ("static", "blackbox"):
        return shared_solves(config, name.base, FIXED)
    return Work()  # a few solves at most


def measured(session: Session) -> tuple[float, float]:
    """Seconds of an evaluation of a sample, without a gradient and with one, of a first few-step solve: of FEW samples,
    or of a whole batch where these take next to no time, as then it is not they that do."""
    config, few = session.config, min(FEW, session.config.teacher.batch_size)
    whole = min(config.teacher.batch_size, config.static.batch_size)
    found = _measured(session, few)
    return found if whole <= few or sum(found) * few * min(config.nfe) > QUICK else _measured(session, whole)


def _measured(session: Session, count: int) -> tuple[float, float]:
    config = session.config
    index, x_T, condition = session.training_noises(count)
    batch = Batch(torch.tensor(index), x_T, x_T, condition)
    name, nfe = config.solvers[0], min(config.nfe)
    objective = session.objective(session.solver(name))
    times = next(iter(session.starts(steps_of(objective.solver, nfe)).values())).times

    def once(run: Any) -> float:
        began = time.perf_counter()
        run()
        if x_T.is_cuda:
            torch.cuda.synchronize(x_T.device)
        return (time.perf_counter() - began) / (len(batch) * nfe)

    def with_gradient() -> None:
        objective(TimeGrid(times.clone().requires_grad_()), batch).sum().backward()

    once(lambda: objective.measure(TimeGrid(times), batch))  # what is made once, is made now
    plain = once(lambda: objective.measure(TimeGrid(times), batch))
    try:
        return plain, once(with_gradient)
    except torch.OutOfMemoryError:
        raise
    except (TsAdaptError, RuntimeError):  # this denoiser has no gradient
        return plain, SLOWER * plain


def disk(session: Session) -> float:
    """Bytes of the teacher's samples, by far the most of what is kept: the target, the condition, and of a trajectory
    its N+1 states and N x0."""
    options = session.config.teacher
    _, x_T, condition = session.training_noises(1)
    states = 1 + (2 * session.teacher_grid().steps + 1 if options.trajectory else 0)
    given = sum(part.nbytes for part in tensors_in(condition))
    return float(x_T.nbytes * states + given) * (options.train_samples + options.test_samples)


def weights(session: Session) -> float:
    """Bytes of the network's parameters."""
    network = session.denoiser.network
    return 0.0 if network is None else float(sum(each.nbytes for each in network.parameters()))


def spoken(seconds: float) -> str:
    """A time in words: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
