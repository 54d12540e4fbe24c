"""A study of optuna that any number of workers share, each of which may die at any moment.

    draw i      the i-th trial that repeats no other                        i = 0, 1, ..., asked - 1
    repetition  a trial in the place of a draw that failed; its attribute `again` is the number of the draw's first

A worker takes a trial, shows signs of life while it works on it (an attribute that counts), and tells the value. A
trial whose count has stood still for SILENCE seconds, by the clock that the one who watches it started itself, is taken
for that of a dead worker: it fails and is made again. So all trials end complete or failed, one of each draw complete,
whoever dies when; a value that comes after all is dropped. optuna's own heartbeat is kept by databases only, goes by
their time of day, and misses a worker that died before its first.

    sqlite:///FILE   postgresql+psycopg://USER@HOST/DATABASE   ...   any that optuna and SQLAlchemy take
    journal:///FILE  optuna's journal, for workers that share a folder, as SQLite three slashes and the path
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState, create_trial

from ts_adapt.errors import TsAdaptError, one_line
from ts_adapt.options import Place

SIGN = 5.0
"""Seconds between two signs of life."""
SILENCE = 30.0
"""Seconds without one, after which a worker is dead."""
PAUSE = 0.5
"""Seconds between two looks at the trials of others."""
JOURNAL = "journal:///"
AGAIN, ALIVE = "again", "alive"
_CLAIMED = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)


def open_study(name: str, url: str, sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    """The study called `name`, to be minimised, in the storage at `url`; begun there if there is none.

    Raises TsAdaptError for a storage that cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with explained(url):
            return optuna.create_study(study_name=name, storage=_storage(url), sampler=sampler, load_if_exists=True)
    except ImportError as error:
        raise TsAdaptError(
            f"the storage {url!r} cannot be used: its driver is not installed ({error}); the one of PostgreSQL comes "
            "with `pip install ts_adapt[postgres]`"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise _unusable(url, error) from error


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turns what the storage at `url` raises while it is used into a TsAdaptError of one sentence."""
    from sqlalchemy.exc import SQLAlchemyError  # a fifth of a second to import

    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.OptunaError, OSError) as error:
        raise _unusable(url, error) from error


def _unusable(url: str, error: Exception) -> TsAdaptError:
    reason = one_line(error.__cause__ or error)
    remedy = "give a URL such as sqlite:///file.db in a folder that exists and has space"
    if "locked" in reason:
        remedy = (
            "others write to it: run the same command again when they have ended, its trials are kept; for many "
            "workers take journal:///FILE or a database server"
        )
    elif any(word in reason for word in ("malformed", "not a database", "JSON")):
        remedy += ", or remove the damaged file"
    return TsAdaptError(f"the storage {url!r} cannot be used ({reason}); {remedy}")


def draw_of(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> int:
    """Which draw `trial` is, or repeats; `trials` are all of the study."""
    return sum(AGAIN not in other.user_attrs for other in trials[: _first_of(trial)])


def complete(study: optuna.Study) -> dict[int, FrozenTrial]:
    """The complete trials by their draws, in the order of their numbers; a repetition comes late."""
    trials = study.get_trials(deepcopy=False)
    draws = {number: draw for draw, number in enumerate(t.number for t in trials if AGAIN not in t.user_attrs)}
    return {draws[_first_of(trial)]: trial for trial in trials if trial.state == TrialState.COMPLETE}


class Worker:
    """One of the processes that work on `study`, until `asked` draws are complete.

    alone  no other process does: what is under way there is that of one that died
    """

    def __init__(self, study: optuna.Study, asked: int, *, alone: bool) -> None:
        self.study, self.asked, self.alone = study, asked, alone
        self._seen: dict[int, tuple[Any, float]] = {}

    def take(self) -> optuna.Trial | None:
        """A trial to be made, or None when all are complete; waits where the rest is under way elsewhere."""
        while True:
            self._fail_the_dead()
            trials = self.study.get_trials(deepcopy=False)
            draws = [trial.number for trial in trials if AGAIN not in trial.user_attrs][: self.asked]
            claimed = {_first_of(trial): trial.state for trial in trials if _claimed(trial)}
            if len(draws) == self.asked and all(claimed.get(draw) == TrialState.COMPLETE for draw in draws):
                return None
            lost = [draw for draw in draws if draw not in claimed]
            if lost:
                self.study.add_trial(create_trial(state=TrialState.WAITING, user_attrs={AGAIN: lost[0]}))
            elif len(draws) == self.asked and TrialState.WAITING not in claimed.values():
                time.sleep(PAUSE)
                continue
            trial = self.study.ask()
            if self._wanted(trial.number):
                return trial
            self._fail(trial.number)

    @contextmanager
    def working_on(self, trial: optuna.Trial) -> Iterator[None]:
        """Shows signs of life while the block runs; if it raises, the trial has failed."""
        ended = Event()

        def show() -> None:
            count = 0
            while not ended.wait(SIGN):
                count += 1
                with suppress(Exception):  # a storage out of reach: `tell` says so, if it stays
                    trial.set_user_attr(ALIVE, count)

        signs = Thread(target=show, daemon=True)
        if not self.alone:
            signs.start()
        try:
            yield
        except BaseException:
            self._fail(trial.number)
            raise
        finally:
            ended.set()
            if signs.is_alive():
                signs.join()

    def tell(self, trial: optuna.Trial, value: float) -> None:
        """The value of a trial that was taken; not a number counts as infinite."""
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            self.study.tell(trial, math.inf if math.isnan(value) else value, skip_if_finished=True)

    def _wanted(self, number: int) -> bool:
        """Whether a trial just taken is of the draws asked for, and no other worker took its draw before."""
        trials = self.study.get_trials(deepcopy=False)
        others = [t for t in trials[:number] if _first_of(t) == _first_of(trials[number]) and _claimed(t)]
        return not others and draw_of(trials, trials[number]) < self.asked

    def _fail_the_dead(self) -> None:
        now = time.monotonic()
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            sign = trial.user_attrs.get(ALIVE)
            last, since = self._seen.get(trial.number, (sign, now))
            self._seen[trial.number] = sign, since if last == sign else now
            if self.alone or (last == sign and now - since > SILENCE):
                self._fail(trial.number)

    def _fail(self, number: int) -> None:
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def _claimed(trial: FrozenTrial) -> bool:
    return trial.state in _CLAIMED


def _first_of(trial: FrozenTrial) -> int:
    """The number of the trial that made the draw of `trial` first."""
    number: int = trial.user_attrs.get(AGAIN, trial.number)
    return number


def _storage(url: str) -> BaseStorage:
    if url.startswith(JOURNAL):
        path = os.path.abspath(Place().expanded("blackbox.storage", url.removeprefix(JOURNAL)))
        return JournalStorage(JournalFileBackend(path, lock_obj=_Mending(path)))
    several: dict[str, Any] = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    return RDBStorage(url, engine_kwargs=several)


class _Mending(JournalFileSymlinkLock):
    """The lock of a journal; who holds it first cuts off the half line that a full disk or a killed worker left."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = path

    def acquire(self) -> bool:
        held = super().acquire()
        try:
            with open(self._path, "rb+") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                if file.read() not in (b"", b"\n"):
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        except BaseException:
            self.release()
            raise
        return held
