"""learn: everything that a config asks for, in order, by the ordinary jobs: teach, search and train, then evaluate.

    teach      the teacher's samples
    NAME       each of the config's `learn`, behind what it is learned from
    evaluate   all of them and the fixed grids, on the same test noises

What is there already stays, so that the same command goes on where it was interrupted. The config that it ran with is
left beside its results, so that every other command can go on with its files. The demo is such a config.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from ts_adapt.config import Config
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.records import STATIC
from ts_adapt.jobs import plan
from ts_adapt.jobs.evaluate import evaluate
from ts_adapt.jobs.experiment import SPLITS
from ts_adapt.jobs.export_scheduler import is_for_diffusers
from ts_adapt.jobs.matched_images import check_images
from ts_adapt.jobs.runs import check_student, listed
from ts_adapt.jobs.search import search
from ts_adapt.jobs.session import Session
from ts_adapt.jobs.teach import teach
from ts_adapt.jobs.timing import Timing
from ts_adapt.jobs.train import check_predicted, train
from ts_adapt.options import yaml_text
from ts_adapt.schedules.name import ORACLE, PREDICTOR, SHARED, Name, parse
from ts_adapt.search.optimized import ON_MODEL
from ts_adapt.search.work import Pace, Work
from ts_adapt.storage.files import write_bytes
from ts_adapt.storage.layout import REPORT

PROGRAM = "ts-adapt"
SAID = {
    "static": "one grid for all samples",
    "blackbox": "one grid for all samples, without gradients",
    "oracle": "the best grid for each test sample",
    "one-shot": "a network that predicts the grid from the noise",
    "recursive": "a network that chooses the next time at every step",
}
CORRECTED = {"static": "static", "oracle": "per_sample"}
"""What corrections may stand behind -> the group of options that has them."""


@dataclass(frozen=True)
class Step:
    """One job: what it makes, what `run` does, how much of it is missing, and how long that takes here."""

    name: str
    said: str
    run: Callable[[], object]
    work: Work
    pace: Callable[[Timing], Pace]

    def seconds(self, timing: Timing) -> float:
        return self.work.seconds(self.pace(timing)) if self.work != Work() else 0.0


def learn(config: Config, *, redo: bool = False, progress: bool = True) -> Path:
    """Do all of `config`, print what came out and how to go on, and return the report's path.

    redo  as in `search` and `train`: what was searched or trained with other options is replaced
    """
    session, began = Session(config, progress=progress), time.monotonic()
    steps, timing = steps_of(session, redo=redo), Timing(session)
    if any(step.work != Work() for step in steps):
        print("timing a batch of each job", flush=True)
    left = [step.seconds(timing) for step in steps]
    for number, step in enumerate(steps, 1):
        so_far, rest = time.monotonic() - began, sum(left[number - 1 :])
        to_go = f", about {plan.spoken(rest)} to go" if rest else ""
        print(f"[{number} of {len(steps)}, {so_far:.0f} s{to_go}] {step.name}: {step.said}", flush=True)
        step.run()
    kept, report = write_config(config, session.workspace.config), session.workspace.evaluation / REPORT
    print(f"[{time.monotonic() - began:.0f} s] done\n\nThe report is {report}. To go on with what was learned here:")
    learned = wanted(config, session.static_name, session.base, not session.denoiser.loop_times_only)
    print("\n".join(next_commands(learned, kept, for_diffusers=is_for_diffusers(session))))
    return report


def show_plan(config: Config, *, redo: bool = False) -> None:
    """Print what `learn` would do, what is missing of it, and what that takes; a batch of each job is done to time
    it."""
    session = Session(config, progress=False)
    steps, timing = steps_of(session, redo=redo), Timing(session)
    left = [step.seconds(timing) for step in steps]
    rows = [(step.name, step.work, plan.spoken(took)) for step, took in zip(steps, left, strict=True)]
    rows.append(("in all", sum((step.work for step in steps), Work()), plan.spoken(sum(left))))
    width = max(len(name) for name, _, _ in rows)
    print(f"{'':{width}}{'evaluations':>14}{'with gradient':>15}{'about':>9}")
    for name, work, took in rows:
        print(f"{name:{width}}{work.plain:14,.0f}{work.gradient:15,.0f}{took:>9}")
    print(
        f"one evaluation of one sample: {timing.search.plain:.2g} s, with a gradient {timing.search.gradient:.2g} s; "
        f"samples on disk: "
        f"{plan.disk(session) / 2**20:,.0f} MiB; weights: {plan.weights(session) / 2**20:,.0f} MiB of memory\n"
        f"kept in {session.workspace.data} and {session.workspace.logs}; nothing was begun"
    )


def steps_of(session: Session, *, redo: bool = False) -> list[Step]:
    """The jobs of a config, in order; TsAdaptError for what one of them would refuse after the work of others."""
    config = session.config
    names = wanted(config, session.static_name, session.base, not session.denoiser.loop_times_only)
    predictors = [str(name) for name in names if name.kind == PREDICTOR]
    learning = [config.static for name in names if name.base == STATIC] + [config.train for _ in predictors]
    session.check(scores=True, caption=max((options.caption for options in learning), default=0.0))
    if any(options.distribution or options.adversarial for options in learning):
        check_images(session)
    listed(session)
    check_counts(config, names)
    for name in names:
        if name.base == STATIC:
            session.check_static(name.corrections)
        elif name.kind != SHARED:
            session.check_told(str(name))
    if predictors:
        check_predicted(session, predictors)
    steps = " and ".join(dict.fromkeys(f"{config.teacher.nfe_of(split)}-step" for split in SPLITS))
    taught = f"{steps} solves of {config.model.name}, for learning and for the test"
    compared = f"every schedule on the same {config.evaluate.samples} test noises"
    learned = {step.name: step for name in names for step in _steps(session, name, redo)}  # labels serve all predictors
    return [
        Step("teach", taught, lambda: teach(session), plan.of_teacher(session), lambda timing: timing.teach),
        *learned.values(),
        Step(
            "evaluate",
            compared,
            lambda: evaluate(session),
            plan.of_evaluation(session, len(names)),
            lambda timing: timing.evaluate,
        ),
    ]


def _steps(session: Session, name: Name, redo: bool) -> list[Step]:
    """The job that makes `name`, behind that of the labels that it is learned from."""
    config, work = session.config, plan.of_result(session, name, redo=redo)
    said = SAID.get(name.base, "one grid for all samples")
    said += f", with {', '.join(name.corrections)}" if name.corrections else ""
    if name.kind == PREDICTOR:
        run = partial(train, session, str(name), redo=redo)
        training = Step(str(name), said, run, work, lambda timing: timing.train(str(name)))
        if config.train.loss == "end_to_end":
            return [training]
        own = session.changed(per_sample=replace(config.per_sample, corrections=[]))
        labels = plan.of_result(session, Name(ORACLE, "oracle"), "train", redo=redo)
        run = partial(search, own, "per-sample", "train", redo=redo)
        return [Step("labels", "the best grid for each training sample", run, labels, _searching), training]
    own = session
    if name.base in CORRECTED:
        group = CORRECTED[name.base]
        own = session.changed(**{group: replace(getattr(config, group), corrections=[*name.corrections])})
    method, split = ("per-sample", "test") if name.kind == ORACLE else (name.base, "train")
    return [Step(str(name), said, partial(search, own, method, split, redo=redo), work, _searching)]


def _searching(timing: Timing) -> Pace:
    return timing.search


def wanted(config: Config, static: str, base: str, told: bool = True) -> list[Name]:
    """What the config's `learn` names, each once: the static grid that the others begin at, then whatever is one grid
    for all samples, as grids of samples begin at such a one with their corrections where there is one.

    static  what the config's shared grid is called, and `base` that which its predictors begin at
    told    whether the network can be told the times of a predictor, which is made then where nothing else is said
    """
    usual = [STATIC, static, *(["recursive"] if told else [])]
    asked = usual if config.learn is None else config.learn
    names = sorted(dict.fromkeys(map(parse, asked)), key=lambda name: name.kind != SHARED)
    onwards = any(name.kind != SHARED or name.corrections for name in names)
    begun = [base] if any(name.kind == PREDICTOR for name in names) else []
    return list(dict.fromkeys([*map(parse, [*([STATIC] if onwards else []), *begun]), *names]))


def check_counts(config: Config, names: list[Name]) -> None:
    """TsAdaptError where fewer samples are taught than learned from, or than are compared."""
    train, test, learned = config.teacher.train_samples, config.teacher.test_samples, {name.kind for name in names}
    searched = config.static_samples + config.static_validating
    needed = [("static_samples with static_validation", searched, "train", train)]
    needed += [("train.samples", config.train.samples, "train", train)] if PREDICTOR in learned else []
    if PREDICTOR in learned and config.train.loss != "end_to_end":
        needed.append(("label_samples", config.label_samples, "train", train))
    if any(name.base in ON_MODEL for name in names):
        needed.append(("optimized.samples", config.optimized.samples, "train", train))
    needed.append(("evaluate.samples", config.evaluate.samples, "test", test))
    if ORACLE in learned:
        needed.append(("oracle_samples", config.oracle_samples, "test", min(test, config.evaluate.samples)))
    for option, count, split, there in needed:
        if count > there:
            raise TsAdaptError(
                f"option {option} takes {count} {split} samples, there are {there}; lower it, or raise "
                f"teacher.{split}_samples"
            )
    check_student(config)


def write_config(config: Config, path: Path) -> Path:
    """`config`, every option of it, as a YAML file that --config takes."""
    write_bytes(path, yaml_text(asdict(config)).encode())
    return path


def next_commands(learned: list[Name], kept: Path, *, for_diffusers: bool = True) -> list[str]:
    """Commands that run as they stand, in the folder of this run, on what the run of the config `kept` left.

    learned        what that was
    for_diffusers  whether there is a pipeline of diffusers for it
    """
    names = [str(name) for name in learned if name.kind != ORACLE]
    commands = [["sample", "--config", kept, "--schedule", name, "--count", "64"] for name in reversed(names)]
    if STATIC in names:
        commands.append(["export", STATIC, "--config", kept, "--format", "sigmas"])
    if STATIC in names and for_diffusers:
        commands.append(
            ["export", STATIC, "--config", kept, "--format", "diffusers", "--out", kept.parent / "scheduler"]
        )
    commands.append(["evaluate", "--config", kept])
    return [f"    {shlex.join(map(str, [*_program(), *words]))}" for words in commands]


def _program() -> list[str]:
    """How this program is called here: by its name where the shell finds it, else by its file, else by python."""
    called = Path(sys.argv[0])
    if called.name != PROGRAM:
        return [sys.executable, "-m", "ts_adapt.cli"]
    found = shutil.which(PROGRAM)
    return [PROGRAM] if found and Path(found).resolve() == called.resolve() else [str(called)]
