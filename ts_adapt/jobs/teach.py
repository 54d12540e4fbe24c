"""teach: the teacher's samples, split by split; finished shards are kept, and several processes share them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ts_adapt import distributed
from ts_adapt.jobs.converged import check_teacher
from ts_adapt.jobs.session import Session
from ts_adapt.search.work import Work
from ts_adapt.teacher.generate import generate
from ts_adapt.teacher.store import TeacherStore


def teach(session: Session, splits: Sequence[str] = ("train", "test"), *, save_png: bool = False) -> None:
    """Generate the teacher's end points for each split, and say how near to converged those of learning are; finished
    shards are kept."""
    session.check()
    options = session.config.teacher
    solver = session.solver(options.solver)
    for split in splits:
        samples = options.train_samples if split == "train" else options.test_samples
        folder, config = session.workspace.teacher(split), session.teacher_config(split)
        store = distributed.first(partial(TeacherStore.create, folder, config))
        generate(
            session.denoiser, solver, session.teacher_grid(options.nfe_of(split)), store,
            samples=samples, batch_size=options.batch_size, condition=session.condition_source(split),
            save_png=save_png, progress=session.progress,
            announce=partial(_announce, session, split),
        )  # fmt: skip
        print(f"teacher, {split}: {samples} samples in {store.folder}")
        if split == "train":
            distributed.first(partial(check_teacher, session))


def _announce(session: Session, split: str, samples: int) -> None:
    session.announce(f"teacher, {split}", Work(samples * session.config.teacher.nfe_of(split)))
