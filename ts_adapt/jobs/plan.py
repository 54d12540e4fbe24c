"""What learning takes, said before it begins: evaluations of the network from the options, time by `timing`.

evaluations   one of one sample, guided or not; with a gradient they are counted apart
of a search   as many as it makes where it does not end early, of what is missing yet
"""

from __future__ import annotations

from collections.abc import Sequence

from ts_adapt.grids.corrections import corrected
from ts_adapt.jobs import converged
from ts_adapt.jobs.labels import label_options, labelling_work
from ts_adapt.jobs.search import shared_work
from ts_adapt.jobs.session import Session, recorded, stays
from ts_adapt.jobs.train import training_work
from ts_adapt.numerics import tensors_in
from ts_adapt.predictors.store import load_predictor, nfes_of
from ts_adapt.predictors.training import choosing
from ts_adapt.schedules.file import LearnedGrid
from ts_adapt.schedules.name import ORACLE, PREDICTOR, Name
from ts_adapt.search.labels import LabelStore
from ts_adapt.search.work import Work
from ts_adapt.storage.files import read_json
from ts_adapt.storage.layout import ALL, CONFIG, LABELS, MANIFEST
from ts_adapt.teacher.store import TeacherStore


def of_teacher(session: Session) -> Work:
    """The samples that the teacher has not yet made, and those by which it is checked."""
    options, work = session.config.teacher, Work()
    for split, wanted in (("train", options.train_samples), ("test", options.test_samples)):
        folder = session.workspace.teacher(split)
        made = len(TeacherStore.open(folder).indices) if (folder / MANIFEST).exists() else 0
        work += Work(plain=max(0, wanted - made) * options.nfe_of(split))
    return work if converged.of_teacher(session) else work + converged.work(session)


def of_result(session: Session, name: Name, split: str = "test", *, redo: bool = False) -> Work:
    """What `name` stands for, for those solvers and NFEs for which it is missing; `split` of grids of samples.

    redo  what was made with other options is made again; without it TsAdaptError
    """
    config, work = session.config, Work()
    for solver in config.solvers:
        missing = [nfe for nfe in config.nfe if not _is_there(session, name, split, solver, nfe, redo)]
        if not str(name).endswith(ALL):
            each = [_one(session, name, split, solver, nfe) + Work(results=1) for nfe in missing]
            work = sum(each, work)
        elif missing:  # one network, trained for all
            work += training_work(session, solver, config.nfe) + Work(results=len(config.nfe))
        elif left_open := _left_open(session, str(name), solver):
            method = session.solver(solver)
            work += choosing(left_open, config.train.validating).times(method.evaluations_per_step)
    return work


def _left_open(session: Session, name: str, solver: str) -> Sequence[int]:
    """The numbers of steps that the workspace's predictor was trained for, where it has yet to choose what it keeps
    between them; else none."""
    folder = session.workspace.predictor(name, solver, session.config.nfe[0])
    predictor, _ = load_predictor(folder, session.noise_schedule)
    return predictor.learned if predictor.without_k else ()


def of_evaluation(session: Session, learned: int) -> Work:
    """Fixed grids and `learned` schedules on the test noises."""
    config, work = session.config, Work()
    for solver in config.solvers:
        for nfe in config.nfe:
            runs = len(session.fixed_grids(session.steps(solver, nfe))) + learned
            work += Work(plain=nfe * config.evaluate.samples, results=1).times(runs)
    return work.times(len(config.students))


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


def _one(session: Session, name: Name, split: str, solver: str, nfe: int) -> Work:
    """The evaluations of one search or training."""
    config = session.config
    if name.kind == PREDICTOR:
        return training_work(session, solver, [nfe])
    if name.kind == ORACLE:
        count = config.oracle_samples if split == "test" else config.label_samples
        return labelling_work(session, solver, nfe, count)
    if name.base in ("static", "blackbox"):
        return shared_work(session, solver, nfe, name.base)
    return Work()  # a few solves at most


def disk(session: Session) -> float:
    """Bytes of the teacher's samples, by far the most of what is kept: the target, the condition, and of a trajectory
    its N+1 states and N x0."""
    options = session.config.teacher
    _, x_T, condition = session.training_noises(1)
    given, size = sum(part.nbytes for part in tensors_in(condition)), 0.0
    for split, samples in (("train", options.train_samples), ("test", options.test_samples)):
        steps = session.teacher_grid(options.nfe_of(split)).steps
        size += samples * (x_T.nbytes * (2 * steps + 2 if options.trajectory else 1) + given)
    return size


def weights(session: Session) -> float:
    """Bytes of the network's parameters."""
    network = session.denoiser.network
    return 0.0 if network is None else float(sum(each.nbytes for each in network.parameters()))


def spoken(seconds: float) -> str:
    """A time in words: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
