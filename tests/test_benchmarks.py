"""The benchmarks run, and end with one line of JSON that has the promised numbers; how large they are is not tested."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from small_job import Job
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Node
from ts_adapt.policies import StepByStep
from ts_adapt.search import per_sample

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = {
    "search_batching": ("--batch 2 --nfe 3 --iterations 1 --alone 1 --rounds 1", {"ratio"}),
    "network_share": ("--batch 2 --nfe 3 --iterations 1 --rounds 1", {"search", "sampling", "least"}),
    "network_share bf16": (
        "--batch 2 --nfe 3 --iterations 1 --rounds 1 --bf16 --channels-last", {"search", "sampling", "least", "speedup"}
    ),
    "search_memory": ("--batch 1 --steps 2 4", {"growth", "growth_all", "without"}),
    "scaling": (
        "--samples 2 4 --nfe 2 3 --batch 2 --least 0", {"samples_exponent", "nfe_exponent", "exponents"}
    ),
    "label_search": ("--samples 2 --nfe 2 --budgets 8", {"wins", "distance", "seconds", "population", "corrected"}),
    "quantizer_quality": (
        "--samples 2 --nfe 2 --quantizers hqq4 minmax-w8a8 --noises 1 --count 2 --selections normal",
        {"samples", "nfe", "full", "rows"},
    ),
    "guidance_transfer": ("--samples 1 --scales 2 --nfe 3", {"2"}),
    "pipeline_overhead": ("--width 32 --steps 1 --batch 1 --rounds 1", {"sd", "dit"}),
    "scheduler_overhead": ("--steps 2 --batch 1 --rounds 1", {"step_ratio", "one_shot_share", "recursive_share"}),
}  # fmt: skip
"""Script, and what it is called for -> its flags, the keys of its last line."""


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_ends_with_its_numbers(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(per_sample, "trusted", lambda objective, *_: (objective.differentiated("exact"), None))
    script, (flags, keys) = name.split()[0], SCRIPTS[name]
    last = last_line(script, flags.split(), monkeypatch, capsys)
    assert last.keys() == keys
    assert all(number > 0 for number in last.values() if isinstance(number, float))


def last_line(
    script: str, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [script, *flags])
    runpy.run_path(str(FOLDER / f"{script}.py"), run_name="__main__")
    last: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return last


def test_what_learning_costs_is_counted_for_every_method_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job, figure = Job.begun(tmp_path), tmp_path / "drawn" / "cost.png"
    assert job.run("teach", "--split", "train") == 0
    flags = "--solver unipc-2 --nfe 3 --static-sizes 4 --begins 4 --sizes 20 --passes 1 2 --validation 10"
    places = ["--config", str(job.folder / "small.yml"), "--data_root", str(job.data.parent), "--figure", str(figure)]
    found = last_line("learning_cost", [*places, *flags.split()], monkeypatch, capsys)["found"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert {"static", "one-shot", "recursive"} < found.keys()
    assert all(0 < point["gradient"] < 1 and point["mean"] > 0 for points in found.values() for point in points)
    (static,), (once, twice) = found["static"], found["recursive"]
    validated, trained = 2 * 4 * 3, 16 * 3  # solves of three evaluations; validation looks at the spread too
    assert twice["evaluations"] - once["evaluations"] == trained + validated
    assert once["evaluations"] > static["evaluations"] + trained


def test_steps_between_those_learned_are_compared_on_noises_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job, learned = Job.begun(tmp_path), ("--nfe", "2,4")
    training = ("--train.loss", "end_to_end")
    job.do(
        ["teach", "--split", "train"], ["search", *learned],
        ["train", *learned, *training, "--predictor", "recursive-all"],
    )  # fmt: skip
    flags = [*job.options, "--solver", "unipc-2", "--nfe", "4", "--samples", "16", *training]
    last = last_line("between_steps", flags, monkeypatch, capsys)
    found = last["found"]
    assert last["samples"] == 16 and found.keys() == {"3", "5"}
    for compared in found.values():
        means = {name.split(",")[0]: each["mean"] for name, each in compared.items() if " / " not in name}
        begun = [name for name in means if name.startswith("interpolated")][-1]
        (pair,) = (each for name, each in compared.items() if name.endswith(f"/ {begun}"))
        gained = means["recursive-all"] / means[begun] - 1
        assert pair["mean"] == pytest.approx(gained, abs=0.02)  # of means to four places
        assert pair["interval"][0] <= pair["mean"] <= pair["interval"][1]
    with pytest.raises(TsAdaptError, match=r"made with another train\.samples"):
        last_line("between_steps", [*flags, "--train.samples", "16"], monkeypatch, capsys)


def test_the_bands_of_a_range_of_guidance_make_up_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job, nfe = Job.begun(tmp_path), ("--nfe", "2")
    model = "--model.name fashion-ddpm-class --guidance 1.5,8 --teacher.nfe 3 --teacher.train_samples 20"
    few = "--static_samples 4 --static.method adam --derivative exact --train.samples 12 --train.loss end_to_end"
    given = [*model.split(), *few.split(), "--static.corrections", "guidance"]
    job.do(
        ["teach", "--split", "train", *given], ["search", *given, *nfe],
        ["search", *given, *nfe, "--static.corrections", "[]"], ["train", *given, *nfe],
    )  # fmt: skip
    one = [*given, "--name", "one", "--guidance", "3"]
    job.do(["teach", *one], ["search", *one, *nfe], ["train", *one, *nfe])
    flags = [*job.options, "--solver", "unipc-2", *nfe, "--samples", "8", "--bands", "3.5", *given]
    found = last_line("guidance_range", [*flags, "--alone", "one", "3"], monkeypatch, capsys)["found"]
    alone = found.pop("alone")
    session = job.session(*one, *nfe)
    predictor = session.predictor("recursive", "unipc-2", 2).predictor.policy(2)
    apart = session.objective(session.solver("unipc-2")).measure(predictor, session.teacher("test", 20)[1])
    assert alone["samples"] == 20 and alone["of this one"]["mean"] == pytest.approx(float(apart.mean()), abs=1e-4)
    assert alone["of all scales"]["mean"] > 0
    whole, *bands = found.values()
    assert [*found] == ["1.5-8", "1.5-3.5", "3.5-8"]
    assert whole["samples"] == sum(each["samples"] for each in bands) == 8
    for name in ("static", "static+guidance", "recursive, told", "recursive, told 3.46 of all"):
        means = [each["samples"] * each[name]["mean"] for each in bands]
        assert whole[name]["mean"] == pytest.approx(sum(means) / 8, abs=1e-4)
    shown = runpy.run_path(str(FOLDER / "guidance_range.py"))["Told"](StepByStep(Node(0, 1, torch.ones(())), list), 2.0)
    assert shown.init(torch.zeros(1), {"guidance_scale": 8.0, "class_labels": 1})[1] == {
        "guidance_scale": 2.0, "class_labels": 1,
    }  # fmt: skip


def test_what_is_left_out_of_a_schedule_is_judged_on_samples_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = "--model.name fashion-ddpm-plain --evaluate.features judge --teacher.nfe 6 --derivative exact"
    job, few = Job.begun(tmp_path), [*given.split(), "--static.method", "adam", "--static_samples", "4"]
    job.do(["teach", "--split", "train", *few], ["search", *few])
    variants = ["shared, all", "recursive, residual", "recursive, all and guidance", "recursive, all, captions .2"]
    sizes = "--solver unipc-2 --nfe 3 --samples 16 --validation 8 --judged 16 --epochs 1"
    flags = [*job.options, *few, *sizes.split(), "--variants", *variants]
    last = last_line("ablation", flags, monkeypatch, capsys)
    found = last["found"]
    assert [*found] == ["static", "shared, all", "recursive, residual"]  # the model is not guided and has no prompts
    session = job.session(*few)
    judged = session.teacher("train", 40)[1].rows(slice(24, None))
    apart = session.objective(session.solver("unipc-2")).measure(session.static("unipc-2", 3).grid, judged)
    assert found["static"]["mean"] == pytest.approx(float(apart.mean()), abs=1e-4)
    assert (found["static"]["nearer"], found["static"]["operations"]) == (0.5, 1.0)
    assert found["shared, all"]["operations"] == 1 < found["recursive, residual"]["operations"]
    assert all(found[name]["seconds"] > 0 for name in variants[:2])
    assert all(0 <= each["recall"] <= 1 and each["frechet"] > 0 for each in found.values())
    script = runpy.run_path(str(FOLDER / "ablation.py"))
    unfit, matched = script["_unfit"], script["VARIANTS"]["recursive, all, data .3"]
    assert not unfit(session, matched)
    assert "--evaluate.features" in unfit(job.session(*few, "--evaluate.features", "pixels"), matched)
    other = job.session(*few, "--model.name", "emoji-sd")  # the embedded images are none of its
    opposed = script["VARIANTS"]["recursive, all and residual, discriminator .3"]
    assert all("--distribution.data" in unfit(other, variant) for variant in (matched, opposed))
    share = 1 - found["recursive, residual"]["mean"] / found["static"]["mean"]
    assert last["gain"]["recursive, residual"] == pytest.approx(share, abs=0.01)  # of means to four places
