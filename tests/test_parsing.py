"""The command line as it is typed: lists, config files, misspelt words, and the commands that messages name."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from ts_adapt.assembly import FAMILIES, SOLVERS, build_solver, solver_name
from ts_adapt.cli import main, parse
from ts_adapt.config import Config
from ts_adapt.denoisers.analytic import example_mixture
from ts_adapt.errors import TsAdaptError
from ts_adapt.jobs.learn import write_config
from ts_adapt.remedies import command, experiment
from ts_adapt.solvers import DDIM


def config(*words: str) -> Config:
    return parse(["search", *words]).config


@pytest.mark.parametrize("value", ["3,5", "[3,5]", "[3, 5]", "3, 5"])
def test_a_list_has_commas_with_brackets_or_without(value: str) -> None:
    assert config("--nfe", value).nfe == config(f"--nfe={value}").nfe == [3, 5]


def test_a_list_of_one_is_that_one() -> None:
    given = config("--nfe", "7", "--solvers", "ddim+corrector", "--static.corrections", "shift,scale")
    assert (given.nfe, given.solvers) == ([7], ["ddim+corrector"])
    assert given.static.corrections == ["shift", "scale"]
    assert config("--evaluate.grids", "karras").evaluate.grids == ["karras"]
    assert config("--evaluate.grids", "null").evaluate.grids is None


def test_a_config_file_writes_lists_alike_and_flags_behind_it_override_it(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    path.write_text("nfe: 7\nsolvers: unipc-3, ddim\nstatic: {corrections: shift}\nteacher: {nfe: 20}\n")
    given = config("--config", str(path))
    assert (given.nfe, given.solvers, given.static.corrections) == ([7], ["unipc-3", "ddim"], ["shift"])
    assert config("--nfe", "3", "--config", str(path)).nfe == [7]
    assert config(f"--config={path}", "--nfe", "3", "--teacher.nfe", "9").nfe == [3]
    assert config("--config", str(path), "--teacher.nfe", "9").teacher.nfe == 9


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("nfe: 010", [10]),
        ("nfe: [03, 1e1]", [3, 10]),
        ("static_samples: 1_000", 1000),
        ("static_samples: 1e3", 1000),
        ("name: 010", "010"),
        ("name: 2024-01-01", "2024-01-01"),
        ("name: 1.10", "1.10"),
        ("name: 1e3", "1e3"),
        ("name: +1e3", "+1e3"),
        ("name: true", "true"),
        ("name: 99999999999999999999", "99999999999999999999"),
        ("solvers: [ddim-eta.10]", ["ddim-eta0.1"]),
        ("guidance: 1e0", 1.0),
        ("checkpointing: True", True),
        ("teacher:", Config().teacher),
        ("name: ü ö", "ü ö"),
    ],
)
def test_a_number_is_what_a_person_reads_in_a_file_and_on_the_command_line(
    tmp_path: Path, line: str, found: object
) -> None:
    path = tmp_path / "my own ü.yml"
    path.write_text(line)
    option, _, value = line.partition(":")
    assert getattr(config("--config", str(path)), option) == found
    if value:
        assert getattr(config(f"--{option}", value.strip()), option) == found


def test_a_call_is_given_numbers_and_truths_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    path.write_text("model: {call: {height: 64, scale: 1e1, flags: [true, {deep: 2}]}}")
    given = config("--config", str(path)).model.call
    assert given == {"height": 64, "scale": 10.0, "flags": [True, {"deep": 2}]}
    assert [type(given[key]) for key in ("height", "scale")] == [int, float]
    for number in (".nan", "99999999999999999999"):
        path.write_text(f"model: {{call: {{scale: {number}}}}}")
        with pytest.raises(TsAdaptError, match=r"numbers are finite|more than 64 bits"):
            config("--config", str(path))


@pytest.mark.parametrize("name", ["1e3", "+1e3", "1.10", "010", "true", "null", "1_0", "-", "2024-01-01", "ü"])
def test_a_config_that_is_written_is_the_config(tmp_path: Path, name: str) -> None:
    written = Config(name=name, guidance=1e-7, nfe=[3, 5])
    assert config("--config", str(write_config(written, tmp_path / "config.yml"))) == written


@pytest.mark.parametrize("value", ["1:30", "0x10", "0b11", "0o7", "1.5", "yes"])
def test_a_number_that_people_read_otherwise_is_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "a.yml"
    path.write_text(f"teacher: {{nfe: {value}}}")
    for words in (["--config", str(path)], ["--teacher.nfe", value]):
        with pytest.raises(TsAdaptError, match=f"option teacher.nfe is {value}; give"):
            config(*words)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("teacher: {nfe: 50}\nname: x\nteacher: {seed: 3}", "teacher"),
        ("teacher: {nfe: 50, nfe: 3}", "nfe"),
        ("model: {call: {height: 8, width: 8, height: 9}}", "height"),
    ],
)
def test_a_key_that_is_given_twice_is_named(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "a.yml"
    path.write_text(text)
    with pytest.raises(TsAdaptError, match=f"gives '{key}' twice"):
        config("--config", str(path))


def test_paths_mean_what_they_mean_in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/my data/ü")
    path = tmp_path / "a.yml"
    path.write_text("data_root: ~/a b\nlog_root: $DATA/logs\nevaluate: {schedules: [~/s.json], reference: '${DATA}'}")
    given = config("--config", str(path), "--teacher.prompts", "$DATA/p.txt")
    assert (given.data_root, given.log_root) == ("/home/me/a b", "/my data/ü/logs")
    assert (given.evaluate.schedules, given.evaluate.reference) == (["/home/me/s.json"], "/my data/ü")
    assert given.teacher.prompts == "/my data/ü/p.txt"
    assert parse(["sample", "--out", "~/o", "--prompt", "~ $DATA"]).command.out == "/home/me/o"
    assert parse(["prune", "--schedule", "~/s.json"]).command.schedule == "/home/me/s.json"
    assert parse(["export", "$DATA/s.json"]).command.schedule == "/my data/ü/s.json"
    assert parse(["import", "~/sigmas.txt"]).command.file == "/home/me/sigmas.txt"
    assert config("--distribution.data", "~/real").distribution.data == "/home/me/real"
    assert parse(["sample", "--prompt", "~ $DATA"]).command.prompt == ["~ $DATA"]
    for value, what in (("$NOWHERE/x", r"\$NOWHERE"), ("~nobody-here/x", "~nobody-here")):
        with pytest.raises(TsAdaptError, match=f"option data_root is .*, where {what} stands for nothing here"):
            config("--data_root", value)


def test_one_nfe_and_one_solver_are_those_of_the_schedule(tmp_path: Path) -> None:
    def asked(*words: str) -> tuple[int | None, str | None]:
        command = parse(words).command
        return command.steps, command.solver  # type: ignore[attr-defined]

    for name in (("sample",), ("prune",), ("export", "static")):
        assert asked(*name, "--nfe", "6", "--solvers", "unipc") == (6, "unipc-2")
        assert asked(*name, "--nfe", "6", "--solvers", "ddim", "--steps", "4", "--solver", "deis-3") == (4, "deis-3")
        assert asked(*name, "--nfe", "3,6", "--solvers", "ddim,unipc-3") == (None, None)
    (tmp_path / "c.yml").write_text("{nfe: [7], solvers: [ddim]}")
    assert asked("sample", "--config", str(tmp_path / "c.yml")) == (None, None)


def test_a_family_of_solvers_stands_for_one_of_them() -> None:
    assert config("--solvers", "unipc,dpmpp+corrector,ddim").solvers == ["unipc-2", "dpmpp-2m+corrector", "ddim"]
    assert parse(["sample", "--solver", "deis"]).command.solver == "deis-2"
    noise_schedule = example_mixture().noise_schedule
    for family, name in FAMILIES.items():
        assert name in SOLVERS and solver_name(name) == name
        assert vars(build_solver(family, noise_schedule)).keys() == vars(build_solver(name, noise_schedule)).keys()
        assert build_solver(family, noise_schedule).order == build_solver(name, noise_schedule).order
    with pytest.raises(TsAdaptError, match="lists 'unipc-2' twice"):
        config("--solvers", "unipc,unipc-2")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["serach"], "unknown command 'serach'; did you mean 'search'?"),
        (["evalute", "--nfe", "5"], "did you mean 'evaluate'?"),
        (["--config", "a.yml", "teach"], "--config is no command; the command comes first"),
        (["search", "--methd", "static"], "unknown option 'methd'; did you mean 'method'?"),
        (["sample", "--shedule=karras"], "unknown option 'shedule'; did you mean 'schedule'?"),
        (["search", "--static.iters", "3"], "did you mean 'static.iterations'?"),
        (["search", "--zzz", "3"], "unknown option 'zzz'; `ts-adapt search --help-all` lists the options"),
        (["search", "--nfe", "3", "5"], "'5' is no option and no value of one"),
        (
            ["teach", "--method", "static"],
            "--method is an option of search, not of teach; `ts-adapt search --help` says",
        ),
        (
            ["evaluate", "--plan"],
            "--plan is an option of learn and demo, not of evaluate; `ts-adapt learn --help` says",
        ),
        (["search", "--nfe"], "--nfe"),
        (["search", "--nfe", "3,,5"], "give a list, with commas between"),
        (["search", "--quiet=false"], "--quiet takes no value; give it alone, or leave it out"),
        (["search", "--model.call", "3"], "option model.call is 3; give names and values, like {name: value}"),
        (["search", "--distance", "{a: b}"], "unknown distance"),
        (["search", "--name", "a\nb"], "give one folder name"),
        (["sample", "--out", ""], "option out is '', which is no path"),
        (["sample", "--strength", "2"], "option strength is 2.0; give"),
        (["sample", "--solver", ""], "unknown solver ''"),
        (["sample", "--pipeline", "no/such", "--solver", "unipc3"], "did you mean 'unipc-3'"),
        (["search", "--cachers", "deepcache-0"], "of the cacher 'deepcache-0' interval is 0"),
        (["search", "--quantizers", "hqq0"], "of the quantizer 'hqq0' bits is 0"),
        (["search", "--nfe", "three"], "option nfe is three; give a whole number from 1 on, at most 10000"),
        (["search", "--teacher", "5"], "option teacher is 5; it is a group of options, give some of it"),
        (["search", "--teacher.nfe", "1.5"], "option teacher.nfe is 1.5; give"),
        (["search", "--checkpointing", "maybe"], "option checkpointing is 'maybe'; give true or false"),
        (["search", "--method", "statik"], "unknown method 'statik'; did you mean 'static'?"),
        (["search", "--static.method", "lbgfs"], "unknown static.method 'lbgfs'; did you mean 'lbfgs'?"),
        (["search", "--static.corrections", "shift,x"], "unknown static.corrections 'x'; known: shift, scale"),
        (["search", "--trackers", "tensorbord"], "unknown trackers 'tensorbord'; did you mean 'tensorboard'?"),
        (["export"], "export needs a schedule behind it"),
    ],
)
def test_what_is_misspelt_is_one_sentence(words: list[str], expected: str, capsys) -> None:
    assert main(words) == 2
    message = capsys.readouterr().err
    assert message.startswith("ts-adapt: ") and message.count("\n") == 1 and expected in message


def test_a_command_in_a_message_is_for_the_experiment_at_work() -> None:
    words = ["--config", "configs/gaussian.yml", "--quiet", "--solver", "ddim", "--nfe=3,5", "--teacher.nfe", "9"]
    words += ["--count", "2", "--name", "my own"]
    with experiment(parse(["sample", *words]).line.experiment):
        text = command("search", "--method", "static", "--nfe", 5)
    assert shlex.split(text.strip("`")) == [
        "ts-adapt", "search", "--config", "configs/gaussian.yml", "--teacher.nfe", "9", "--name", "my own",
        "--method", "static", "--nfe", "5",
    ]  # fmt: skip
    assert command("search", "--method", "static") == "`ts-adapt search --method static`"


@pytest.mark.parametrize(
    ("name", "one"),
    [
        ("ddim-eta.50", "ddim-eta0.5"), ("ddim-eta0.5", "ddim-eta0.5"), ("ddim-eta00.125", "ddim-eta0.125"),
        ("ddim-eta1.0", "ddpm"), ("ddim-eta0", "ddim"), ("ddim-eta0.0+corrector", "ddim+corrector"),
        ("ddim-eta0.0000001", "ddim-eta0.0000001"),
    ],
)  # fmt: skip
def test_a_share_has_one_spelling(name: str, one: str) -> None:
    given = config("--solvers", name, "--teacher.solver", name)
    assert given.solvers == [given.teacher.solver] == [one] == [solver_name(one)]
    noise_schedule = example_mixture().noise_schedule
    share = float(name.removesuffix("+corrector").removeprefix("ddim-eta"))
    if "+" not in name:
        assert vars(build_solver(name, noise_schedule)) == vars(DDIM(noise_schedule, eta=share))


@pytest.mark.parametrize("name", ["ddim-eta1.5", "ddim-eta-1", "ddim-eta", "ddpm-eta0.5", "ddim-eta0.5+corrector"])
def test_other_shares_are_refused(name: str) -> None:
    with pytest.raises(TsAdaptError, match="cannot be corrected" if "+" in name else "unknown solver"):
        config("--solvers", name)
