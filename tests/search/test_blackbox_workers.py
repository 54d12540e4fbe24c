"""Many workers on one study, one of them killed at work: all trials are accounted for, the others end by themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from threading import Thread

import optuna
import pytest
from optuna.trial import TrialState

from postgres_server import server
from small_job import Job
from ts_adapt.errors import TsAdaptError
from ts_adapt.schedules.file import LearnedGrid
from ts_adapt.search import workers
from ts_adapt.search.workers import AGAIN, Worker, complete, open_study

ASKED = 12
# One process imports and forks. The first worker stops inside its first trial, and is killed when the others work.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import ts_adapt, torch
torch.set_num_threads(1)
from ts_adapt.search import workers
from small_job import Job
import ts_adapt.jobs.search

folder, url, asked = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
workers.SIGN, workers.SILENCE, workers.PAUSE = 0.2, 2.0, 0.1
told, tell = os.pipe()

def fork(stops):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if stops:
                take = workers.Worker.take
                def stop(worker):
                    trial = take(worker)
                    with worker.working_on(trial):
                        os.write(tell, b"x")
                        time.sleep(600)
                workers.Worker.take = stop
            flags = ["--method", "blackbox", "--blackbox.storage", url, "--blackbox.trials", asked]
            code = Job(folder).run("search", *flags)
        finally:
            os._exit(code)
    return child

first = fork(True)
os.read(told, 1)
others = [fork(False) for _ in range(3)]
time.sleep(1)
os.kill(first, signal.SIGKILL)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in [first, *others]]))
"""


def study_in(folder: Path) -> optuna.Study:
    return open_study("a", f"journal:///{folder}/trials.log", optuna.samplers.RandomSampler(0))


def finish(worker: Worker) -> None:
    while (trial := worker.take()) is not None:
        with worker.working_on(trial):
            value = trial.suggest_float("x", 0, 1)
        worker.tell(trial, value)


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


def test_a_silent_worker_is_waited_for_by_our_own_clock_and_its_late_value_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(workers.time, "sleep", lambda pause: now.__setitem__(0, now[0] + pause))
    monkeypatch.setattr(workers.time, "time", lambda: -7.0 * now[0])  # the time of day goes backwards
    silent, other = Worker(study_in(tmp_path), 3, alone=False), Worker(study_in(tmp_path), 3, alone=False)
    late = silent.take()
    assert late is not None
    began = now[0]
    finish(other)
    assert now[0] - began > workers.SILENCE
    silent.tell(late, -1.0)
    assert states(other.study) == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert other.study.trials[3].user_attrs == {AGAIN: 0}
    made = complete(other.study)
    assert {draw: trial.number for draw, trial in made.items()} == {1: 1, 2: 2, 0: 3}
    assert min(trial.value for trial in made.values()) >= 0
    assert silent.take() is None


def test_a_worker_that_shows_life_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SIGN", 0.05)
    monkeypatch.setattr(workers, "PAUSE", 0.05)
    monkeypatch.setattr(workers, "SILENCE", 0.5)
    busy, other = Worker(study_in(tmp_path), 2, alone=False), Worker(study_in(tmp_path), 2, alone=False)
    trial = busy.take()
    assert trial is not None
    with busy.working_on(trial):
        rest = Thread(target=finish, args=(other,))
        rest.start()
        rest.join(2)
        assert rest.is_alive()
    busy.tell(trial, 5.0)
    rest.join(10)
    assert not rest.is_alive() and states(busy.study) == ["COMPLETE", "COMPLETE"]


def test_trials_that_two_take_at_once_are_made_once(tmp_path: Path) -> None:
    one, two = Worker(study_in(tmp_path), 1, alone=False), Worker(study_in(tmp_path), 1, alone=False)
    mine = one.take()
    assert mine is not None
    surplus = two.study.ask()  # as a worker does that looked before the other had taken it
    assert not two._wanted(surplus.number)
    two._fail(surplus.number)
    one.tell(mine, 1.0)
    assert two.take() is None and states(two.study) == ["COMPLETE", "FAIL"]
    more = Worker(study_in(tmp_path), 2, alone=False)
    finish(more)
    assert states(more.study) == ["COMPLETE", "FAIL", "COMPLETE"] and more.study.trials[2].user_attrs == {AGAIN: 1}


def test_a_trial_that_raises_has_failed_at_once(tmp_path: Path) -> None:
    worker = Worker(study_in(tmp_path), 1, alone=False)
    trial = worker.take()
    assert trial is not None
    with pytest.raises(KeyboardInterrupt), worker.working_on(trial):
        raise KeyboardInterrupt
    assert states(worker.study) == ["FAIL"]
    finish(worker)
    assert states(worker.study) == ["FAIL", "COMPLETE"]


def check_four_workers(folder: Path, url: str) -> None:
    job = Job.begun(folder)
    assert job.run("teach") == 0
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n{SCRIPT}"
    command = [sys.executable, "-c", script, str(folder), url, str(ASKED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [-9, 0, 0, 0], done.stderr
    (name,) = optuna.get_all_study_names(workers._storage(url))
    trials = optuna.load_study(study_name=name, storage=workers._storage(url)).trials
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(complete) == ASKED and {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.FAIL}
    (again,) = [trial for trial in complete if AGAIN in trial.user_attrs]
    assert again.user_attrs[AGAIN] == 0 and trials[0].state == TrialState.FAIL
    assert set(again.params.values()) == {0.0}
    schedule = LearnedGrid.load(job.data / "blackbox/unipc-2-nfe3.json")
    assert schedule.about["method"] == "blackbox"


def test_four_workers_on_a_journal_one_killed(tmp_path: Path) -> None:
    check_four_workers(tmp_path, f"journal:///{tmp_path}/trials.log")


@pytest.mark.postgres
def test_four_workers_on_postgresql_one_killed(tmp_path: Path) -> None:
    with server() as url:
        check_four_workers(tmp_path, url)


def test_a_journal_at_a_relative_path_is_locked_and_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        open_study("s", "journal:///sub/t.log", optuna.samplers.RandomSampler())
    assert (tmp_path / "sub/t.log").exists() and sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["t.log"]


def test_optuna_does_not_speak_through(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    optuna.logging.enable_propagation()  # to where it is heard here
    try:
        study = open_study("s", f"sqlite:///{tmp_path / 'a.db'}", optuna.samplers.RandomSampler())
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    finally:
        optuna.logging.disable_propagation()
    assert len(study.trials) == 2 and not caplog.records


def test_nobody_is_told_to_remove_a_database_that_others_write_to(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"
    open_study("s", url, optuna.samplers.RandomSampler())
    with pytest.raises(TsAdaptError, match=r"locked.*run the same command again") as refused, workers.explained(url):
        raise OSError("database is locked")
    assert "remove the" not in str(refused.value)
