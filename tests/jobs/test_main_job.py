"""The whole job through the command line, on the analytic mixture: every step, what it leaves, and how it resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from small_job import Job
from ts_adapt.cli import main
from ts_adapt.jobs.sample import SHOWN_SIDE
from ts_adapt.storage.files import read_tensors

SMALL = """
name: small
model: {name: gaussian-mixture}
solvers: [unipc-2]
nfe: [3]
distance: l2
static_samples: 24
label_samples: 48
oracle_samples: 24
label_batch: 24
teacher: {nfe: 24, train_samples: 48, test_samples: 40, shard_size: 16, batch_size: 16}
static: {iterations: 20, corrections: []}
per_sample: {iterations: 6, random_starts: 1, candidates: 2}
train: {samples: 48, epochs: 2, batch_size: 48, width: 4, hidden: 16}
evaluate: {samples: 40, features: pixels, batch_size: 16}
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Job:
    """An experiment in which the whole job has run once."""
    return Job.begun(tmp_path_factory.mktemp("job"), SMALL).do(
        ["teach", "--save-png"],
        ["search"],
        ["search", "--method", "per-sample"],
        ["search", "--method", "per-sample", "--split", "test"],
        ["train"],
        ["train", "--predictor", "one-shot"],
        ["evaluate"],
        ["sample", "--schedule", "recursive", "--count", "4"],
    )


def scored_folders(job: Job) -> list[tuple[dict[str, float], dict[str, str]]]:
    kept = json.loads((job.logs / "images.json").read_text())
    return [(row, kept["facts"]) for row in kept["rows"]]


def test_the_table_has_every_kind(done):
    table = done.rows()
    assert {row["kind"] for row in table} == {"fixed", "static", "one-shot", "recursive", "oracle"}
    assert {int(row["samples"]) for row in table} == {40, 24}
    assert {row["schedule"] for row in table if row["samples"] == "24"} >= {"oracle", "static", "karras"}


def test_static_beats_fixed_and_the_oracle_beats_static(done):
    subset = {row["schedule"]: float(row["distance"]) for row in done.rows(24)}
    fixed = [float(row["distance"]) for row in done.rows(24) if row["kind"] == "fixed"]
    assert subset["oracle"] < subset["static"] < 1.05 * min(fixed)


def test_the_interval_holds_the_mean(done):
    for row in done.rows():
        assert float(row["distance_low"]) <= float(row["distance"]) <= float(row["distance_high"])


def test_wins_against_static_and_medians_are_of_the_runs(done):
    static = read_tensors(done.runs / "unipc-2-nfe3-static.safetensors")["distance"]
    for row in done.rows():
        kept = read_tensors(done.runs / f"unipc-2-nfe3-{row['schedule']}.safetensors")["distance"]
        kept = kept[: int(row["samples"])]
        assert float(row["distance_median"]) == pytest.approx(float(kept.double().quantile(0.5)), rel=1e-6)
        below, ties = (float(x.double().mean()) for x in (kept < static[: len(kept)], kept == static[: len(kept)]))
        expected = "" if row["schedule"] == "static" else pytest.approx(below + ties / 2)
        assert (float(row["wins"]) if row["wins"] else "") == expected


def test_json_plots_and_page_say_the_same(done):
    data = done.results
    assert len(data["rows"]) == len(done.rows())
    assert {"teacher", "floor", "device"} <= set(data["facts"])
    assert list((done.logs / "plots").glob("schedules-*.png")) and list((done.logs / "plots").glob("images-*.png"))
    page = (done.logs / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(list((done.logs / "plots").glob("*.png")))
    assert "http://" not in page and "https://" not in page


def test_part_of_an_evaluation_leaves_the_rest_of_the_table(done, copy):
    assert copy.run("evaluate", "--nfe", "[4]", "--evaluate.grids", "[karras, karras+native, linear+rounded]") == 2
    names = "[karras, karras+native, log_snr]"
    assert copy.run("evaluate", "--nfe", "[4]", "--evaluate.grids", names) == 0
    table = copy.rows()
    assert [row for row in table if row["nfe"] == "3"] == [row for row in done.rows() if row["nfe"] == "3"]
    added = {row["schedule"]: float(row["distance"]) for row in table if row["nfe"] == "4"}
    assert set(added) == {"karras", "karras+native", "log_snr"}
    page = (copy.logs / "report.html").read_text()
    assert "Schedules, unipc-2, NFE 3" in page and "Schedules, unipc-2, NFE 4" in page
    assert copy.run("evaluate", "--evaluate.samples", "32") == 0
    assert {row["nfe"] for row in copy.rows()} == {"3"}


def test_differences_are_paired_and_hold_their_mean(done):
    data = done.results
    means = {(r["schedule"], r["samples"]): r["distance"] for r in data["rows"]}
    apart = {(d["schedule"], d["against"], d["samples"]): d for d in data["differences"]}
    assert {key[:2] for key in apart} >= {("oracle", "static"), ("recursive", "static")}
    for d in apart.values():
        assert d["difference"] == pytest.approx(
            means[d["schedule"], d["samples"]] - means[d["against"], d["samples"]], abs=1e-6
        )
        assert d["relative"] == pytest.approx(d["difference"] / means[d["against"], d["samples"]], rel=1e-4, abs=1e-6)
        assert d["relative_low"] <= d["relative"] <= d["relative_high"]
    wide = [r["distance_high"] - r["distance_low"] for r in data["rows"] if r["schedule"] == "one-shot"]
    found = [d for key, d in apart.items() if key[:2] == ("one-shot", "static")]
    narrow = [(d["relative_high"] - d["relative_low"]) * means["static", d["samples"]] for d in found]
    assert max(narrow) < min(wide), "hardly trained, it misses where the static grid does"


def test_schedule_files_are_compared_too(done, capsys):
    (done.folder / "mine.json").write_bytes(done.static.read_bytes())
    assert done.run("evaluate", "--evaluate.schedules", f"[{done.folder / 'mine.json'}]") == 0
    scores = {(r["schedule"], r["samples"]): r["distance"] for r in done.rows()}
    assert scores["mine", "40"] == scores["static", "40"]
    message = done.refused(capsys, "evaluate", "--nfe", "[4]", "--evaluate.schedules", f"[{done.folder / 'mine.json'}]")
    assert "add --solvers [unipc-2] --nfe [3]" in message
    (done.folder / "static.json").write_bytes(done.static.read_bytes())
    message = done.refused(capsys, "evaluate", "--evaluate.schedules", f"[{done.folder / 'static.json'}]")
    assert "rename the file" in message


def test_a_folder_of_real_images_is_the_reference_of_their_pixels(done, tmp_path, capsys):
    job, real = Job(Path(shutil.copytree(done.folder, tmp_path / "job"))), tmp_path / "real"
    shutil.copytree(done.data / "teacher/train/images", real)
    flags = ["--evaluate.reference", str(real), "--evaluate.grids", "karras"]
    assert job.run("evaluate", *flags) == 0
    assert {row["schedule"] for row in job.rows()} >= {"karras", "static"}
    capsys.readouterr()
    assert job.run("evaluate", *flags, "--images", str(real)) == 0
    capsys.readouterr()
    ((row, facts),) = scored_folders(job)
    assert row["count"] == 48 and row["fid_data"] == pytest.approx(0, abs=1e-9) and row["precision"] == 1
    assert row["fid_data_low"] < row["fid_data"] < row["fid_data_high"] and facts["reference"] == str(real)
    shutil.copytree(real, tmp_path / "other")
    for path in sorted((tmp_path / "other").glob("*.png"))[::2]:
        path.unlink()
    shutil.copytree(real, tmp_path / "first")
    for path in sorted((tmp_path / "first").glob("*.png"))[24:]:
        path.unlink()
    assert job.run("evaluate", *flags, "--images", str(tmp_path / "first")) == 0
    ((first, _),) = scored_folders(job)
    capsys.readouterr()
    assert job.run("evaluate", *flags, "--images", str(tmp_path / "other"), "--images", str(real)) == 0
    assert "the first 24 images" in capsys.readouterr().out
    (other, _), (begun, _), (apart, _), (to, _) = scored_folders(job)
    assert other["count"] == begun["count"] == apart["count"] == 24 and other["fid_data"] > 0
    assert begun["fid_data"] == first["fid_data"] > row["fid_data"]
    assert apart["fid_data"] == pytest.approx(other["fid_data"] - first["fid_data"])
    flags[1] = str(tmp_path / "first")
    assert job.run("evaluate", *flags, "--images", str(tmp_path / "other")) == 0
    assert to["fid_data"] == pytest.approx(scored_folders(job)[0][0]["fid_data"]) != other["fid_data"]
    flags[1] = str(real)
    message = job.refused(capsys, "evaluate", *3 * ["--images", str(real)])
    assert "names 3 folders" in message
    Image.new("RGB", (4, 5)).save(real / "z.png")
    message = job.refused(capsys, "evaluate", *flags)
    assert f"{real / 'z.png'} is of (1, 5, 4), the model's samples are of (1, 4, 4); resize the images" in message


def test_images_do_not_depend_on_the_batch(done):
    for size, out in (("16", "whole"), ("3", "parts")):
        flags = ["--schedule", "karras", "--count", "7", "--evaluate.batch_size", size, "--out", str(done.folder / out)]
        assert done.run("sample", *flags) == 0
    files = sorted(path.name for path in (done.folder / "whole/images").iterdir())
    assert len(files) == 7
    assert all(
        (done.folder / "whole/images" / f).read_bytes() == (done.folder / "parts/images" / f).read_bytes()
        for f in files
    )


def test_a_class_conditional_model_draws_classes_where_no_label_is_given(tmp_path):
    flags = ["--model.name", "fashion-ddpm-class", "--schedule", "karras", "--steps", "2", "--count", "3"]
    flags += ["--quiet", "--data_root", str(tmp_path / "data"), "--log_root", str(tmp_path / "logs")]
    for label in ([], ["--label", "1"]):
        out = tmp_path / f"out{len(label)}"
        assert main(["sample", *flags, *label, "--out", str(out)]) == 0
    drawn, fixed = (sorted((tmp_path / name / "images").iterdir()) for name in ("out0", "out2"))
    assert len(drawn) == 3
    assert any(a.read_bytes() != b.read_bytes() for a, b in zip(drawn, fixed, strict=True))


def test_pictures_are_written(done):
    assert len(list((done.data / "teacher/train/images").glob("*.png"))) == 48
    samples = done.logs / "samples/recursive-unipc-2-nfe3"
    assert len(list((samples / "images").glob("*.png"))) == 4
    with Image.open(samples / "grid.png") as grid, Image.open(samples / "images/00000.png") as image:
        factor = SHOWN_SIDE // max(image.size)
        assert factor > 1 and grid.size == tuple(2 + 2 * (factor * side + 2) for side in image.size)
        shown = grid.crop((2, 2, 2 + factor * image.width, 2 + factor * image.height))
        assert shown.tobytes() == image.convert("RGB").resize(shown.size, Image.Resampling.NEAREST).tobytes()


@pytest.fixture
def copy(done, tmp_path) -> Job:
    return Job(Path(shutil.copytree(done.folder, tmp_path / "copy")))


def test_optimised_grids_stand_beside_the_others(copy):
    for method in ("dmn", "gits", "oss", "klub"):
        assert copy.run("search", "--method", method, "--optimized.samples", "16", "--optimized.places", "24") == 0
        times = json.loads((copy.data / f"{method}/unipc-2-nfe3.json").read_text())["times"]
        assert len(times) == 4 and times == sorted(times, reverse=True)
    assert copy.run("evaluate") == 0
    kinds = {row["schedule"]: row["kind"] for row in copy.rows()}
    assert {name for name, kind in kinds.items() if kind == "optimized"} == {"dmn", "gits", "oss", "klub"}
    assert copy.run("sample", "--schedule", "gits", "--count", "2") == 0


def test_corrections_are_learned_from_the_static_grid_on_and_have_rows_of_their_own(copy):
    assert copy.run("search", "--static.method", "lbfgs", "--static.corrections", "[scale, shift]") == 0
    saved = json.loads((copy.data / "static+shift+scale/unipc-2-nfe3.json").read_text())
    assert saved["model_times"] and saved["output_scale"] and not saved["coefficients"]
    plain = json.loads((copy.data / "static/unipc-2-nfe3.json").read_text())
    assert saved["measured"]["distance"]["value"] <= plain["measured"]["distance"]["value"]
    assert copy.run("evaluate") == 0
    kinds = {row["schedule"]: row["kind"] for row in copy.rows()}
    assert kinds["static+shift+scale"] == kinds["static"] == "static"
    assert copy.run("sample", "--schedule", "static+shift+scale", "--count", "2") == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--predictor", "oneshot"], "did you mean 'one-shot'"),
        (["evaluate", "--evaluate.samples", "4000"], "--split test --teacher.test_samples 4000`"),
        (["evaluate", "--model.device", "cuda:9"], "cannot be used here"),
        (["teach", "--teacher.nfe", "40"], "steps = 24"),
        (["evaluate", "--teacher.nfe", "25"], "steps = 24"),
        (["evaluate", "--teacher.seed", "4"], "made with seed"),
        (["evaluate", "--distance", "l1"], "another distance"),
        (["sample", "--schedule", "static+scale"], "--static.corrections scale --solvers unipc-2 --nfe 3`"),
        (["sample", "--schedule", "oss"], "--method oss --solvers unipc-2 --nfe 3`"),
        (["search", "--method", "gits", "--optimized.samples", "8", "--optimized.places", "2"], "choice of 1 to 2"),
        (["train", "--name", "fresh"], "ts-adapt teach"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(done, capsys, arguments, expected):
    assert expected in done.refused(capsys, *arguments)


def test_labels_of_another_teacher_are_refused(done, capsys):
    flags = ["--name", "other", "--teacher.seed", "5"]
    assert done.run("teach", *flags) == 0
    assert done.run("search", *flags) == 0
    shutil.copytree(done.labels(), done.data.parent / "other/labels/train/unipc-2-nfe3")
    assert "belong to the teacher" in done.refused(capsys, "train", "--train.loss", "labels", *flags)


def test_a_model_that_gives_nan_is_named_with_schedule_and_step(done, capsys, monkeypatch):
    from ts_adapt.denoisers.analytic import GaussianMixtureDenoiser

    exact = GaussianMixtureDenoiser.posterior_mean

    def broken(self, x_t, t):
        return exact(self, x_t, t) * (float("nan") if float(t.min()) < 0.5 else 1.0)

    monkeypatch.setattr(GaussianMixtureDenoiser, "posterior_mean", broken)
    assert done.run("evaluate", "--evaluate.grids", "[karras]", "--nfe", "[4]") == 2
    message = capsys.readouterr().err
    assert "unipc-2, NFE 4, karras" in message and "at step" in message
