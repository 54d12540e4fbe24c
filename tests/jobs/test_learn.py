"""learn: a config in one command; the demo is one of its configs, whose printed commands must run on its files."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from small_job import LABEL, Job
from small_job import SMALL as SMALL_JOB
from ts_adapt.assembly import ModelOptions
from ts_adapt.cli import main, parse
from ts_adapt.commands import Demo
from ts_adapt.config import Config, TeacherOptions
from ts_adapt.errors import TsAdaptError
from ts_adapt.jobs import learn
from ts_adapt.jobs import train as training
from ts_adapt.jobs.export_scheduler import is_for_diffusers
from ts_adapt.jobs.session import Session
from ts_adapt.jobs.timing import Timing
from ts_adapt.predictors.phases import TrainOptions
from ts_adapt.predictors.training import TrainResult
from ts_adapt.search import derivative
from ts_adapt.search.objective import Batch
from ts_adapt.search.work import Pace

SMALL = """
name: demo
solvers: [unipc-3]
nfe: [3]
derivative: exact
learn: [static, static+shift, oracle, one-shot, recursive]
rescale_published: true
static_samples: 8
oracle_samples: 8
optimized: {samples: 16}
teacher: {nfe: 8, train_samples: 16, test_samples: 12, shard_size: 128}
static: {iterations: 1, evaluations: 8, starts: 1, corrections: []}
per_sample: {iterations: 1, random_starts: 0}
train: {samples: 12, epochs: 1, width: 4, hidden: 16}
evaluate: {samples: 12, grids: [karras, ays-svd]}
"""


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The demo on a dozen samples."""
    path = tmp_path_factory.mktemp("config") / "demo.yml"
    path.write_text(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Demo, "base", ("--config", str(path)))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a demo, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        text = folder / "stdout"
        with text.open("w") as file, pytest.MonkeyPatch.context() as output:
            output.setattr(sys, "stdout", file)
            assert main(["demo", "--quiet", "--log_root", "results of mine"]) == 0
    return folder, text.read_text()


def commands(text: str) -> list[list[str]]:
    _, _, offered = text.partition("To go on")
    return [shlex.split(line) for line in offered.splitlines() if line.startswith("    ")]


def test_it_ends_with_its_findings_and_the_next_commands(run: tuple[Path, str]) -> None:
    _, text = run
    findings = text[text.index("unipc-3, NFE 3, paired distance to the teacher:") :]
    better, alone = "(better than|worse than|no different from)", "(, by the mean alone)?"
    share = r"[+-][\d.]+ %"
    found = rf"mean {share} \(95 % interval {share} to {share}\), median {share}, nearer on \d+ % of \d+ samples"
    assert re.search(rf"- static is {better} the best fixed grid, (karras|ays-svd){alone}: {found}\.", findings)
    for name in ("static\\+shift", "one-shot", "recursive"):
        assert re.search(rf"- {name} is {better} static{alone}: {found}\.", findings)
    assert re.search(rf"- oracle is {better} static{alone}: {found}; times alone", findings)
    assert {words[words.index("--config") + 1] for words in commands(findings)} == {"results of mine/demo/config.yml"}


def test_it_says_at_each_step_where_it_is_and_how_long_the_rest_takes(run: tuple[Path, str]) -> None:
    _, text = run
    said = re.findall(r"^\[(\d) of (\d), \d+ s(, about [\d.]+ \w+ to go)?\] (\S+):", text, re.MULTILINE)
    names = ["teach", "static", "static+shift", "oracle", "one-shot", "recursive", "evaluate"]
    assert [(int(place), int(count), name) for place, count, _, name in said] == [
        (place, len(names), name) for place, name in enumerate(names, 1)
    ]
    assert all(rest for _, _, rest, _ in said)


def test_the_next_commands_run_as_they_stand(run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, text = run
    monkeypatch.chdir(folder)
    printed = commands(text)
    assert {words[3] for words in printed} == {"sample", "export", "evaluate"}
    for words in printed:
        assert words[:3] == [sys.executable, "-m", "ts_adapt.cli"]
        assert main([*words[3:], "--quiet"]) == 0, words
    logs = folder / "results of mine/demo"
    assert (logs / "samples/static+shift-unipc-3-nfe3/grid.png").exists()
    assert (logs / "scheduler/config.json").exists() or list((logs / "scheduler").iterdir())
    rows = json.loads((logs / "results.json").read_text())["rows"]
    assert {"static", "static+shift", "oracle", "one-shot", "recursive"} <= {row["schedule"] for row in rows}


def test_a_schedule_for_diffusers_is_offered_where_there_is_a_pipeline() -> None:
    for name, there in (("fashion-ddpm", True), ("gaussian-mixture", False)):
        config = Config(model=ModelOptions(name=name))
        assert is_for_diffusers(Session(config, progress=False)) == there
        offered = learn.next_commands(learn.wanted(config, "static", "static"), Path("c.yml"), for_diffusers=there)
        assert [line.split()[-1] for line in offered if "diffusers" in line] == ["scheduler"] * there


def test_a_command_runs_in_a_process_of_its_own(run: tuple[Path, str]) -> None:
    folder, text = run
    words = next(words for words in commands(text) if "sigmas" in words)
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split(",")) == 4


def test_the_config_is_the_one_it_ran_with(run: tuple[Path, str]) -> None:
    folder, _ = run
    ran = parse(["demo", "--log_root", "results of mine"]).config
    for command in ("sample", "demo"):
        assert parse([command, "--config", str(folder / "results of mine/demo/config.yml")]).config == ran
    assert (ran.teacher.nfe, ran.log_root) == (8, "results of mine")


def test_other_options_are_refused_and_redo_takes_them(
    run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(run[0], tmp_path / "demo"))
    monkeypatch.chdir(folder)
    words = ["demo", "--quiet", "--log_root", "results of mine", "--static.lr", "0.02", "--train.lr", "0.02"]
    static, kept = folder / "train_data/demo/static/unipc-3-nfe3.json", folder / "results of mine/demo/config.yml"
    before, options = static.read_bytes(), kept.read_bytes()
    capsys.readouterr()
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "static.lr (0.08, now 0.02)" in message and "--redo" in message and message.count("\n") == 1
    assert static.read_bytes() == before and kept.read_bytes() == options
    monkeypatch.setattr(learn, "evaluate", lambda session: ([], Path("report.html")))
    assert main([*words, "--redo"]) == 0
    assert json.loads(static.read_text())["made_with"]["static"]["lr"] == 0.02
    for kind in ("one-shot", "recursive"):
        config = folder / f"train_data/demo/predictors/{kind}/unipc-3-nfe3/config.json"
        assert json.loads(config.read_text())["made_with"]["train"]["lr"] == 0.02
    assert kept.read_bytes() != options


def test_the_program_is_called_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "bin" / "ts-adapt"
    script.parent.mkdir()
    script.write_text("")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", "")
    assert shlex.split(learn.next_commands([], Path("c.yml"))[0])[0] == str(script)
    monkeypatch.setenv("PATH", str(script.parent))
    assert shlex.split(learn.next_commands([], Path("c.yml"))[0])[0] == "ts-adapt"


def test_a_config_is_learned_in_one_command_which_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job.begun(tmp_path)
    monkeypatch.setattr(learn, "train", interrupted)
    with pytest.raises(RuntimeError, match="killed"):
        job.run("learn")
    assert job.static.exists() and job.labels().exists()
    kept = job.content()
    monkeypatch.undo()
    capsys.readouterr()
    assert job.run("learn") == 0
    text = capsys.readouterr().out
    assert "5 of 5" in text and "is there already" in text
    assert {name: text for name, text in job.content().items() if name in kept} == kept
    assert (job.data / "predictors/recursive/unipc-2-nfe3/config.json").exists()
    assert {row["schedule"] for row in job.rows()} == {"karras", "linear", "static", "recursive"}


def test_how_derivatives_agree_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["--static_samples", "32", "--static_validation", "8", "--train.samples", "40", "--train.validation", "8"]
    job, asked = Job.begun(tmp_path).do(["teach"]), []

    def compared(*_: object) -> list[float]:
        asked.append(1)
        return [1.0, 1.0, 1.0]

    monkeypatch.setattr(derivative, "_gradient", compared)
    job.do(["search", *sizes])
    assert asked
    asked.clear()
    job.do([*LABEL, *sizes], ["train", *sizes])
    assert not asked


def interrupted(*_: object, **__: object) -> None:
    raise RuntimeError("killed")


def test_a_plan_begins_nothing_and_what_is_there_is_not_counted(
    finished: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job.begun(tmp_path)
    assert job.run("learn", "--plan") == 0
    text = capsys.readouterr().out
    assert not job.data.exists() and not (tmp_path / "logs/small/runs").exists()
    counted = {line.split()[0]: line.split()[1:3] for line in text.splitlines()[1:6]}
    assert counted["teach"] == [f"{12 * (40 + 20) + 16 * (2 * 12 + 3):,}", "0"]  # and how near it is to converged
    assert counted["evaluate"] == [f"{3 * 20 * (2 + 2)}", "0"]
    assert list(counted) == ["teach", "static", "labels", "recursive", "evaluate"]
    more = "static+shift+scale+coefficients"
    assert finished.run("learn", "--plan", "--learn", f"static,{more},recursive,one-shot") == 0
    table = capsys.readouterr().out.splitlines()[:9]
    assert len({len(line) for line in table}) == 1  # its columns stand below one another
    counted = {line.split()[0]: line.split()[1:3] for line in table[1:8]}
    assert more in counted
    assert [counted[name] for name in ("teach", "static", "labels", "recursive")] == [["0", "0"]] * 4
    assert counted["one-shot"] != ["0", "0"]


@pytest.mark.parametrize(("seconds", "timed"), [(0.2, [4, 24]), (1.0, [4])])
def test_whole_batches_are_timed_where_they_do_not_take_long(
    seconds: float, timed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, noises = [], Timing._noises

    def drawn(self: Timing, count: int) -> Batch:
        counts.append(count)
        return noises(self, count)

    monkeypatch.setattr(Timing, "_noises", drawn)
    monkeypatch.setattr("ts_adapt.jobs.timing.seconds", lambda *_, **__: seconds)
    config = Config(teacher=TeacherOptions(batch_size=24), nfe=[3])
    assert Timing(Session(config)).teach.plain == pytest.approx(seconds / (timed[-1] * 3)) and counts == timed


def test_what_each_job_takes_is_measured_with_all_that_it_does() -> None:
    options = TrainOptions(samples=80, batch_size=16)
    config = Config(model=ModelOptions(name="gaussian-mixture"), distance="l2", nfe=[3], train=options)
    timing = Timing(Session(config, progress=False))
    grid, recursive = timing.search, timing.train("recursive-all")
    assert recursive is timing.train("recursive")
    assert recursive.gradient > 2 * grid.gradient and recursive.plain > 2 * grid.plain  # its own network, the optimizer
    assert timing.evaluate.result > timing.search.result > 0  # the cost and the scores of a run, beside a figure


def test_what_is_to_go_is_what_the_jobs_behind_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Known:
        teach, search, evaluate = Pace(0.1, 0), Pace(0, 0, 70), Pace(0, 0, 1000)

        def __init__(self, session: Session) -> None:
            pass

    monkeypatch.setattr(learn, "Timing", Known)
    job = Job.begun(tmp_path)
    assert job.run("learn", "--learn", "static") == 0
    said = [line.partition("]")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    first, static, evaluating, done = said
    assert "to go" in first and "to go" not in done
    assert static.endswith("about 51 min to go") and evaluating.endswith("about 50 min to go")  # of three runs


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ([], ["static", "static+shift+history+embedding", "recursive"]),
        (["--static.corrections", "[]"], ["static", "recursive"]),
        (["--static.corrections", "shift,scale"], ["static", "static+shift+scale", "recursive"]),
        (["--learn", "one-shot,static", "--static.corrections", "[]"], ["static", "one-shot"]),
        (["--learn", "blackbox"], ["blackbox"]),
        (
            ["--learn", "oracle+shift,recursive,static+shift", "--static.corrections", "shift"],
            ["static", "static+shift", "oracle+shift", "recursive"],
        ),
        (["--learn", "[]"], []),
    ],
)
def test_what_is_learned_is_listed_and_begins_at_the_static_grid(asked: list[str], made: list[str]) -> None:
    session = Session(parse(["learn", *asked]).config, progress=False)
    assert [str(name) for name in learn.wanted(session.config, session.static_name, session.base)] == made


def test_what_cannot_be_learned_is_refused_by_name() -> None:
    with pytest.raises(TsAdaptError, match=r"karras.*known: static, blackbox"):
        parse(["learn", "--learn", "static,karras"])


LABELS = "--train.loss labels --train.corrections"


@pytest.mark.parametrize(
    ("commands", "flags", "named"),
    [
        ("learn", "--static_samples 30", "static_samples with static_validation takes 60 train samples, there are 40"),
        ("learn", "--train.samples 50", "train.samples takes 50 train samples, there are 40"),
        ("learn", "--evaluate.samples 21", "evaluate.samples takes 21 test samples, there are 20"),
        ("learn --learn oracle", "--oracle_samples 30", "oracle_samples takes 30 test samples, there are 20"),
        ("learn", "--student.quantizer hqq4", "hqq4, which is not evaluated"),
        ("learn --learn gits", "--optimized.samples 50", "optimized.samples takes 50 train samples, there are 40"),
        ("learn", "--evaluate.clip zoo", "evaluate.clip scores images by their prompts"),
        ("learn", "--evaluate.reference nowhere.npz", "nowhere.npz"),
        ("learn", "--evaluate.reference five.npz", "five.npz is of 5 features"),
        (
            "learn --learn static,one-shot; train --predictor one-shot", "--train.corrections residual",
            "has residual, and a one-shot predictor is asked once",
        ),
        (
            "learn --learn static,one-shot-all; train --predictor one-shot-all",
            "--train.corrections residual --train.loss both",
            "has residual, and a one-shot-all predictor is asked once",
        ),
        (
            "learn --learn static,one-shot; train --predictor one-shot", f"{LABELS} start",
            "has start, and labels teach times alone",
        ),
        (
            "learn --learn static,recursive; train --predictor recursive", f"{LABELS} residual",
            "has residual, and labels teach times alone",
        ),
        ("learn; train", "--train.loss labels --train.adversarial 0.5", "labels teach times, no adversarial"),
        ("learn; search", "--static.method forward --static.soft_teacher true", "set static.method to adam"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], commands: str, flags: str,
    named: str,
) -> None:  # fmt: skip
    job = Job.begun(tmp_path)
    monkeypatch.chdir(tmp_path)
    np.savez("five.npz", mu=np.zeros(5), sigma=np.eye(5))
    for command in commands.split("; "):
        assert named in job.refused(capsys, *command.split(), *flags.split())
    assert not job.data.exists()


def test_a_start_of_what_is_no_picture_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job, wanted = Job.begun(tmp_path), ("learn", "--train.corrections", "start", "--learn")
    monkeypatch.setattr(Session, "seen_shape", (3, 8, 8))
    assert "start, a change of pictures" in job.refused(capsys, *wanted, "static,recursive")
    assert not job.data.exists()
    assert job.run(*wanted, "static", "--plan") == 0


@pytest.mark.parametrize("loss", ["static.adversarial", "train.distribution"])
def test_images_to_learn_from_that_are_not_there_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loss: str
) -> None:
    job = Job.begun(tmp_path, SMALL_JOB.replace("features: pixels", "features: inception"))
    monkeypatch.setattr(Session, "_check_networks", lambda session: None)
    monkeypatch.setattr(Timing, "evaluate", Pace(0, 0))
    asked = ("learn", "--learn", "static,recursive", "--static.method", "adam", f"--{loss}", "0.5")
    assert "nowhere holds no images" in job.refused(capsys, *asked, "--distribution.data", "nowhere")
    assert not job.data.exists()
    assert job.run("learn", "--learn", "[]", f"--{loss}", "0.5", "--distribution.data", "nowhere", "--plan") == 0


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--static.iterations", "3"), "static.iterations (2, now 3)"),
        (("--per_sample.iterations", "3"), "per_sample.iterations (2, now 3)"),
        (("--train.epochs", "2"), "train.epochs (1, now 2)"),
    ],
)
def test_what_was_made_with_other_options_is_refused_before_anything_new_is_made(
    job: Job, capsys: pytest.CaptureFixture[str], changed: tuple[str, ...], named: str
) -> None:
    before, asked = job.content(), ("learn", "--nfe", "2,3", "--learn", "static,recursive", *changed)
    message = job.refused(capsys, *asked)
    assert named in message and "--redo" in message
    assert job.content() == before
    assert job.run(*asked, "--plan", "--redo") == 0
    assert job.content() == before


def test_labels_are_searched_once_for_all_that_learn_from_them() -> None:
    words = ["learn", "--model.name", "gaussian-mixture", "--learn", "one-shot,recursive", "--train.loss", "both"]
    made = learn.steps_of(Session(parse(words).config, progress=False))
    assert [step.name for step in made] == ["teach", "static", "labels", "one-shot", "recursive", "evaluate"]


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "configs").glob("*.yml")), ids=lambda path: path.stem
)
def test_the_configs_teach_as_many_samples_as_they_learn_from(path: Path) -> None:
    config = parse(["learn", "--config", str(path)]).config
    learn.check_counts(config, learn.wanted(config, "static", "static"))


def test_a_predictor_that_stayed_the_static_grid_says_so_and_what_may_help(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for learned, stayed in ((1.0, True), (0.9, False)):
        apart = {3: (torch.tensor([learned]), torch.tensor([1.0]))}
        result = TrainResult({3: 1.0}, {3: learned}, apart=apart)
        monkeypatch.setattr(training, "train_predictor", lambda *_, result=result, **__: result)
        words = ("train", "--predictor", "recursive", "--train.loss", "end_to_end", "--train.validation", "7", "--redo")
        assert job.run(*words, "--train.lr", f"{learned / 1000}") == 0
        text = capsys.readouterr().out
        assert ("it stayed the static grid" in text) == stayed
        verdict = "mean 0.0 % below, median 0.0 % below, nearer on 50 % of 1"
        assert (verdict if stayed else "mean 10.0 % below, median 10.0 % below, nearer on 100 % of 1") in text
        assert ("on 7 validation samples; more train.samples (now 20) or train.epochs (now 1)" in text) == stayed


def test_a_training_goes_on_where_an_option_is_new_and_not_given(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, result = [], TrainResult({3: 1.0}, {3: 0.9}, apart={3: (torch.tensor([0.9]), torch.tensor([1.0]))})
    record = TrainOptions.record.fget

    def trained(*_: object, checkpoint: Path, **__: object) -> TrainResult:
        checkpoints.append(checkpoint.name)
        return result

    monkeypatch.setattr(training, "train_predictor", trained)
    for added in ({}, {"new": None}, {"new": 1}):
        monkeypatch.setattr(TrainOptions, "record", property(lambda self, more=added: {**record(self), **more}))
        assert job.run("train", "--predictor", "recursive", "--train.loss", "end_to_end", "--redo") == 0
        (job.data / "predictors/recursive/unipc-2-nfe3/config.json").unlink()
    assert checkpoints[0] == checkpoints[1] != checkpoints[2]


def test_more_samples_continue_or_the_price_is_named(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.run("teach", "--teacher.train_samples", "48") == 0
    message = job.refused(capsys, "search", "--static_samples", "10")
    assert "static_samples (8, now 10)" in message and "--redo" in message and "teacher's samples stay" in message


@pytest.mark.parametrize(("options", "count"), [({}, 102), ({"validation": 7}, 7), ({"samples": 10_000}, 512)])
def test_as_many_samples_validate_as_are_asked_for(options: dict[str, int], count: int) -> None:
    assert TrainOptions(**options).validating == count
    with pytest.raises(TsAdaptError, match="leave some to learn from"):
        _ = TrainOptions(samples=20, validation=20).validating


@pytest.mark.parametrize("job", ["learn", "evaluate"])
@pytest.mark.parametrize("missing", ["inception", "clip", "reference"])
def test_weights_that_cannot_be_had_are_noticed_before_any_work(
    job: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*args: object, **options: object) -> None:
        raise OSError("name resolution failed")

    monkeypatch.setattr("cleanfid.inception_torchscript.check_download_inception", unreachable)
    monkeypatch.setattr("transformers.CLIPModel.from_pretrained", unreachable)
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\n")
    options = {
        "inception": ["--model.name", "fashion-ddpm", "--evaluate.features", "inception"],
        "reference": ["--model.name", "fashion-ddpm", "--evaluate.reference", "."],
        "clip": ["--model.name", "emoji-sd", "--teacher.prompts", "prompts.txt", "--evaluate.clip", "owner/name"],
    }
    assert main([job, *options[missing], "--quiet"]) == 2
    said = capsys.readouterr().err
    lacking = f"cannot be had (name resolution failed).*evaluate.{missing}".replace("(", r"\(").replace(")", r"\)")
    assert re.search("holds no images" if missing == "reference" else lacking, said)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]
