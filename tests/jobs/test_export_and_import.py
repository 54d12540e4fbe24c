"""export and import through the command line: stdout holds the text alone, stderr what it drops."""

from __future__ import annotations

import io
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from small_job import Job
from ts_adapt.assembly import ModelOptions
from ts_adapt.cli import main
from ts_adapt.grids import fixed
from ts_adapt.interfaces import TimeGrid
from ts_adapt.pipelines.load import build_denoiser
from ts_adapt.predictors.store import load_predictor
from ts_adapt.schedules.file import LearnedGrid

MIXTURE = build_denoiser(ModelOptions(name="gaussian-mixture")).noise_schedule


def test_the_search_fills_every_named_place(finished: Job) -> None:
    about = LearnedGrid.load(finished.static, MIXTURE).about
    assert (about["order"], about["model"], about["prediction"]) == (2, "gaussian-mixture", "epsilon")
    assert (about["method"], about["seed"], about["distance"]) == ("static", 0, "l2")
    assert (about["teacher_solver"], about["teacher_nfe"], about["teacher_grid"]) == ("unipc-3", 12, "log_snr")
    assert about["teacher_seed"] == 0 and len(about["teacher"]) == 64
    measured = about["measured"]["distance"]
    assert measured["evaluator"] == "l2" and measured["samples"] == 8 and measured["value"] > 0


def test_json_exported_and_imported_is_identical_and_knows_its_fid(finished: Job, tmp_path: Path, capsys) -> None:
    out, again = tmp_path / "a.json", tmp_path / "b.json"
    assert finished.run("export", str(finished.static), "--out", str(out)) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert finished.run("import", str(out), "--out", str(again)) == 0
    assert again.read_bytes() == out.read_bytes()
    exported, kept = json.loads(out.read_text()), json.loads(finished.static.read_text())
    measured = exported.pop("measured")
    assert measured.items() >= kept.pop("measured").items() and exported == kept
    (row,) = (r for r in finished.results["rows"] if r["schedule"] == "static" and r["samples"] == 20)
    assert measured["fid"]["value"] == row["fid_data"]
    assert (measured["fid"]["evaluator"], measured["fid"]["samples"]) == ("pixels features", 20)
    capsys.readouterr()
    assert finished.run("export", "static") == 0
    assert capsys.readouterr().out == out.read_text()


def test_measurements_of_another_grid_are_not_taken(finished: Job, tmp_path: Path, capsys) -> None:
    kept = json.loads(finished.static.read_text())
    moved = {**kept, "times": [kept["times"][0], *fixed.make("karras", MIXTURE, 3).tolist()[1:]], "log_snr": None}
    (tmp_path / "a.json").write_text(json.dumps({**moved, "model": "another"}))
    assert finished.run("export", str(tmp_path / "a.json")) == 0
    assert "fid" not in json.loads(capsys.readouterr().out)["measured"]


def test_a_predictors_static_grid_is_exported_with_its_origin(finished: Job, capsys) -> None:
    assert finished.run("export", str(finished.predictor)) == 0
    printed = capsys.readouterr()
    assert "has a grid for each sample" in printed.err
    content = json.loads(printed.out)
    assert content["times"] == load_predictor(finished.predictor, MIXTURE)[0].static_times.tolist()
    assert content["teacher"] == json.loads(finished.static.read_text())["teacher"]


def test_a_file_is_exported_without_its_model(finished: Job, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("ts_adapt.jobs.experiment.build_denoiser", lambda *_: pytest.fail("the model was loaded"))
    for kind in ("sigmas", "comfyui", "a1111", "json"):
        assert main(["export", str(finished.static), "--format", kind, "--model.name", "none/such"]) == 0
        assert capsys.readouterr().out


def test_a_file_goes_over_to_other_steps_beside_another_teacher(finished: Job, capsys) -> None:
    assert finished.run("export", str(finished.static), "--steps", "7", "--teacher.nfe", "9") == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["times"]) == 8
    assert re.search("is unmeasured: the teacher folder .* was made with", printed.err)


def test_a_list_as_fine_as_the_teachers_is_not_measured_by_it(finished: Job, capsys, monkeypatch) -> None:
    monkeypatch.setattr("ts_adapt.sampling._evaluate", lambda *_: pytest.fail("the network was evaluated"))
    for nfe in (12, 10_000):
        assert finished.run("export", "static", "--steps", str(nfe), "--format", "sigmas") == 0
        printed = capsys.readouterr()
        assert len(printed.out.split(",")) == nfe + 1
        assert "is unmeasured: the teacher takes 12 evaluations itself" in printed.err


def test_a_measurement_says_what_is_done_and_how_far_it_is(finished: Job, capsys) -> None:
    words = ["export", "static", "--config", str(finished.folder / "small.yml"), *finished.roots, "--steps", "4"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert "measuring NFE 4 on 8 noises" in printed.err and json.loads(printed.out)["nfe"] == 4


def test_export_import_and_sample(finished: Job, tmp_path: Path, capsys) -> None:
    listed, imported = tmp_path / "list.txt", tmp_path / "list.json"
    assert finished.run("export", str(finished.static), "--format", "sigmas", "--out", str(listed)) == 0
    warnings = capsys.readouterr().err.splitlines()
    assert "is written as 0" in warnings[-1] and all(line.startswith("ts-adapt: warning: ") for line in warnings)
    assert finished.run("import", str(listed), "--format", "sigmas", "--out", str(imported)) == 0
    assert "the last 0 becomes" in capsys.readouterr().err
    schedule = LearnedGrid.load(imported, MIXTURE)
    assert torch.allclose(schedule.grid.times, LearnedGrid.load(finished.static).grid.times, atol=1e-7)
    assert (schedule.solver, schedule.nfe, schedule.about["method"]) == ("unipc-2", 3, "imported")
    assert schedule.about["source"] == "list.txt"
    assert finished.run("sample", "--schedule", str(imported), "--count", "2", "--out", str(tmp_path / "images")) == 0


def test_the_nfe_of_an_imported_list_is_the_solvers(finished: Job, tmp_path: Path, capsys) -> None:
    (tmp_path / "list.txt").write_text("150, 10, 0.3, 0")
    flags = ("--format", "sigmas", "--solver", "heun")
    assert finished.run("import", str(tmp_path / "list.txt"), *flags) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["solver"], content["nfe"], content["order"]) == ("heun", 6, 2)


def test_text_is_read_from_stdin(finished: Job, monkeypatch, capsys) -> None:
    text = io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf[150, 10, 0.3, 0]\r\n"))
    monkeypatch.setattr("sys.stdin", text)
    assert finished.run("import", "-", "--format", "sigmas") == 0
    assert len(json.loads(capsys.readouterr().out)["times"]) == 4


def test_corrections_are_dropped_with_a_warning(finished: Job, tmp_path: Path, capsys) -> None:
    times = fixed.make("karras", MIXTURE, 3)
    full = LearnedGrid(TimeGrid(times, times[:-1] * 0.9, torch.ones(3, dtype=torch.float64)), "unipc-2", 3)
    full.save(tmp_path / "full.json", MIXTURE)
    assert finished.run("export", str(tmp_path / "full.json"), "--format", "sigmas") == 0
    assert "cannot carry model times and output scale: dropped" in capsys.readouterr().err
    assert finished.run("export", str(tmp_path / "full.json"), "--format", "json") == 0
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out == (tmp_path / "full.json").read_text()


@pytest.mark.parametrize("source", ["static", "FILE"])
def test_a_number_that_was_not_learned_is_sampled_along_the_list_that_is_exported(
    finished: Job, tmp_path: Path, capsys, source: str
) -> None:
    source, exported = str(finished.static) if source == "FILE" else source, tmp_path / "exported.json"
    assert finished.run("export", source, "--steps", "5", "--out", str(exported)) == 0
    capsys.readouterr()
    for schedule, out in ((source, "asked"), (str(exported), "given")):
        assert (
            finished.run("sample", "--schedule", schedule, "--steps", "5", "--count", "3", "--out", str(tmp_path / out))
            == 0
        )
    warned = capsys.readouterr().err
    assert warned.count("was not learned for NFE 5: this is interpolated") == 1
    assert "`ts-adapt export" in warned and "measures what is lost by it" in warned
    for number in range(3):
        asked, given = (tmp_path / out / f"images/{number:05d}.png" for out in ("asked", "given"))
        assert asked.read_bytes() == given.read_bytes()


def test_timesteps_of_a_model_with_a_table(tmp_path: Path, capsys) -> None:
    out = tmp_path / "steps.txt"
    assert main(["export", "karras", "--steps", "4", "--format", "timesteps", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["import", str(out), "--format", "timesteps"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["times"] == [*map(float, out.read_text().split(",")), 0.0]
    assert "the end, 0, is added" in printed.err


def test_a_native_grid_comes_back_and_goes_over_to_other_steps(tmp_path: Path, capsys) -> None:
    model, kept = ["--model.name", "fashion-ddpm", "--solver", "ddim"], str(tmp_path / "k.json")
    assert main(["export", "karras+native", *model, "--steps", "5", "--out", kept]) == 0
    for steps in ("5", "7"):
        written = str(tmp_path / f"{steps}.txt")
        assert main(["export", kept, *model, "--steps", steps, "--format", "sigmas", "--out", written]) == 0
        capsys.readouterr()
        assert main(["import", written, *model, "--format", "sigmas"]) == 0
        times = json.loads(capsys.readouterr().out)["times"]
        assert len(times) == int(steps) + 1 and times[-2:] == [0, -1]
        assert times[0] == 999 and all(after < time for time, after in pairwise(times))
    assert main(["export", kept, *model, "--steps", "5"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path(kept).read_text())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["export", "STATIC", "--format", "timesteps", "--model.name", "fashion-ddpm"], "another noise schedule"),
        (["export", "BAD"], "is damaged, or no JSON file"),
        (["export", "karras", "--out", "/proc/x/y"], "/proc/x/y"),
        (["import", "BAD"], "give --format sigmas or --format timesteps"),
        (["import", "BAD", "--format", "json"], "is damaged, or no JSON file"),
        (["import", "BINARY", "--format", "sigmas"], "is no text"),
        (["import", "HUGE", "--format", "sigmas"], "bytes; it is no file of the kind"),
        (["import", "no/such.txt", "--format", "sigmas"], "there is no file no/such.txt"),
        (["import", "STATIC", "--solver", "ddim"], "leave --solver out"),
        (["import", "STATIC", "--model.name", "fashion-ddpm"], "another noise schedule"),
        (["import", "FEWER"], "3 steps; unipc-2 with NFE 4 takes 4"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(finished: Job, tmp_path: Path, capsys, arguments, expected) -> None:
    content = {
        "BAD": b"14.6, abc",
        "BINARY": b"\x89PNG\r\n\x1a\n\xff",
        "HUGE": b"1," * 34_000_000,
        "FEWER": finished.static.read_bytes().replace(b'"nfe": 3', b'"nfe": 4'),
    }
    names = {"STATIC": str(finished.static)}
    for name in set(arguments) & set(content):
        names[name] = str(tmp_path / f"{name.lower()}.txt")
        Path(names[name]).write_bytes(content[name])
    assert expected in finished.refused(capsys, *(names.get(word, word) for word in arguments))


def test_a_damaged_table_of_results_is_named(finished: Job, tmp_path: Path, capsys) -> None:
    logs = tmp_path / "logs/small"
    logs.mkdir(parents=True)
    for content in ("{", '{"rows": 1, "facts": {}}', '{"rows": [1], "facts": {}}', '{"rows": [{}], "facts": {}}'):
        (logs / "results.json").write_text(content)
        flags = ["--log_root", str(tmp_path / "logs")]
        assert "results.json" in finished.refused(capsys, "export", str(finished.static), *flags)
