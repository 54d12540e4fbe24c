"""Schedules on disk and on the hub, as users of diffusers know them; damaged and foreign files are one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from own_loops import CONFIG, NOISE
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids import fixed
from ts_adapt.interfaces import TimeGrid
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.predictors.store import save_predictor
from ts_adapt.schedulers.scheduler import LearnedScheduler
from ts_adapt.schedules.file import LearnedGrid

SHAPE = (1, 8, 8)


def static() -> LearnedScheduler:
    torch.manual_seed(0)
    full = TimeGrid(
        fixed.make("karras", NOISE, 4), torch.rand(4).double() * 900, torch.rand(4).double(), torch.rand(4, 3).double()
    )
    plain = TimeGrid(fixed.make("beta", NOISE, 7))
    about = {"model": "tiny", "teacher": "ab12", "distance": "l2"}
    return LearnedScheduler.from_schedules(
        [LearnedGrid(full, "unipc-3", 4, about), LearnedGrid(plain, "unipc-3", 7, about)], CONFIG, clip_x0=True
    )


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_static_schedules_come_back_as_they_were(tmp_path: Path) -> None:
    saved = static()
    saved.save_pretrained(tmp_path / "s")
    assert files(tmp_path / "s") == ["scheduler_config.json"]
    loaded = LearnedScheduler.from_pretrained(tmp_path / "s")
    assert {**loaded.config, "_use_default_values": 0} == {**saved.config, "_use_default_values": 0}
    assert loaded.config["learned_for"] == {"model": "tiny", "teacher": "ab12", "distance": "l2"}
    for steps in (4, 7):
        ours, theirs = loaded.source.grids[steps], saved.source.grids[steps]
        for name in ("times", "model_times", "output_scale", "coefficients"):
            one, other = getattr(ours, name), getattr(theirs, name)
            assert one is other is None or torch.equal(one, other), name
    in_subfolder = LearnedScheduler.from_pretrained(str(tmp_path), subfolder="s", solver="ddim")
    assert in_subfolder.config["solver"] == "ddim"
    _, unused = LearnedScheduler.from_pretrained(tmp_path / "s", return_unused_kwargs=True, colour="red")
    assert unused == {"colour": "red"}


def test_families_and_flows_come_back(tmp_path: Path) -> None:
    LearnedScheduler.from_grid("karras", solver="unipc").save_pretrained(tmp_path / "f")
    loaded = LearnedScheduler.from_pretrained(tmp_path / "f")
    assert loaded.known_noise is None and loaded.source.family == "karras"
    LearnedScheduler.from_config(FlowMatchEulerDiscreteScheduler().config).save_pretrained(tmp_path / "g")
    assert LearnedScheduler.from_pretrained(tmp_path / "g").prediction == "velocity"


@pytest.mark.parametrize("kind", [OneShot, Recursive])
def test_predictors_come_back_with_their_weights(kind: Any, tiny: Any, tmp_path: Path) -> None:
    pair, both = [tiny.predictor(kind, NOISE, SHAPE, n) for n in (4, 6)], tiny.predictor(kind, NOISE, SHAPE, 4, 6)
    about = {"model": "tiny", "distance": "l2"}
    for given, expected in (
        (pair[:1], ["config.json", "model.safetensors", "scheduler_config.json"]),
        ([both], ["config.json", "model.safetensors", "scheduler_config.json"]),
        (
            pair,
            [f"nfe{n}/{f}" for n in (4, 6) for f in ("config.json", "model.safetensors")] + ["scheduler_config.json"],
        ),
    ):
        steps = [(n, predictor) for predictor in given for n in predictor.learned]
        folder = tmp_path / f"{len(given)}-{len(steps)}"
        LearnedScheduler.from_predictors(given, "unipc-3", CONFIG, learned_for=about).save_pretrained(folder)
        assert files(folder) == expected
        loaded = LearnedScheduler.from_pretrained(folder)
        assert loaded.source.learned == tuple(n for n, _ in steps)
        assert loaded.config["learned_for"] == about
        for n, predictor in steps:
            read = loaded.source.predictors[n]
            assert not read.training and type(read) is kind
            for name, value in predictor.state_dict().items():
                assert torch.equal(value, read.state_dict()[name]), name
    again = tiny.predictor(kind, NOISE, SHAPE, 4).requires_grad_(False)
    again.encoder.bias.add_(1)
    LearnedScheduler.from_predictors(again, "unipc-3", CONFIG).save_pretrained(folder)  # over the two of before
    read = LearnedScheduler.from_pretrained(folder).source.predictors[4]
    assert torch.equal(read.encoder.bias, again.encoder.bias)
    with pytest.raises(TsAdaptError, match=r"the weights of the predictors for \(4, 6\) are not here"):
        LearnedScheduler.from_config(loaded.config).save_pretrained(tmp_path / "without")


def test_a_schedule_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    static().save_pretrained(tmp_path / "repo" / "sub")
    asked = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tmp_path / "repo")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loaded = LearnedScheduler.from_pretrained("owner/name", subfolder="sub", revision="v1", token="t")
    assert loaded.source.learned == (4, 7)
    ((name, options),) = asked
    assert (name, options["revision"], options["token"]) == ("owner/name", "v1", "t")
    assert all(Path(pattern).suffix in (".json", ".safetensors") for pattern in options["allow_patterns"])
    assert all(pattern.startswith("sub/") for pattern in options["allow_patterns"])

    def unreachable(name: str, **options: Any) -> str:
        raise OSError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(TsAdaptError, match=r"'owner/name' is no folder here, .*\(no network\)"):
        LearnedScheduler.from_pretrained("owner/name")


def test_push_to_hub_uploads_all_files(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    uploaded: list[list[str]] = []
    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", lambda repo, **options: SimpleNamespace(repo_id=repo))
    monkeypatch.setattr(
        "diffusers.configuration_utils.create_repo", lambda repo, **options: SimpleNamespace(repo_id=repo)
    )
    monkeypatch.setattr(
        "diffusers.utils.hub_utils.upload_folder", lambda folder_path, **o: uploaded.append(files(Path(folder_path)))
    )
    schedule = LearnedScheduler.from_predictors(tiny.predictor(OneShot, NOISE, SHAPE), "unipc-3", CONFIG)
    schedule.push_to_hub("owner/name", subfolder="s")
    schedule.save_pretrained(str(tmp_path / "name"), push_to_hub=True)
    assert uploaded == [["config.json", "model.safetensors", "scheduler_config.json"]] * 2


def edited(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "scheduler_config.json").read_text())
    (folder / "scheduler_config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_damaged_and_foreign_files_are_refused_in_one_sentence(tiny: Any, tmp_path: Path) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(TsAdaptError, match=message) as caught:
            LearnedScheduler.from_pretrained(folder)
        assert "\n" not in str(caught.value)

    refused(tmp_path, "holds no schedule that save_pretrained wrote$")
    predictor = tiny.predictor(OneShot, NOISE, SHAPE)
    save_predictor(tmp_path / "bare", predictor, {})
    refused(tmp_path / "bare", "made a schedule by from_predictors")
    DDIMScheduler().save_pretrained(tmp_path / "foreign")
    refused(tmp_path / "foreign", "is the config of DDIMScheduler, not of LearnedScheduler.*from_config takes over")
    static().save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "scheduler_config.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    refused(tmp_path / "a", "is damaged, or no JSON file")
    path.write_text("[1]")
    refused(tmp_path / "a", "the config of no scheduler")
    path.write_text(whole)
    refused(edited(tmp_path / "a", grids={"4": {"times": [1, 2, 3, 4, 5]}}), "not decreasing")
    refused(edited(tmp_path / "a", grids=None, predictors=[4]), "there is no predictor in .*nfe4")
    LearnedScheduler.from_predictors(predictor, "unipc-3", CONFIG).save_pretrained(tmp_path / "p")
    refused(edited(tmp_path / "p", predictors=[5]), "is for 4 steps, the config says 5")
    refused(
        edited(tmp_path / "p", predictors=[4], beta_schedule="linear", num_train_timesteps=500), "outside the noise"
    )
    edited(tmp_path / "p", num_train_timesteps=1000)
    weights = tmp_path / "p" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    refused(tmp_path / "p", "is truncated, or no safetensors file")
    with pytest.raises(TsAdaptError, match="is a file; a schedule is saved in a folder"):
        static().save_pretrained(path)


@pytest.mark.parametrize("name", [None, 5, b"bytes", ["list"], "a\0b", "x" * 5000, "~nobody-of-that-name/x", "a b/c/d"])
def test_names_that_are_no_schedule(name: Any, tmp_path: Path) -> None:
    with pytest.raises(TsAdaptError) as caught:
        LearnedScheduler.from_pretrained(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 6000
    with pytest.raises(TsAdaptError, match="subfolder 3"):
        LearnedScheduler.from_pretrained(tmp_path, subfolder=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", [None, 5, "a\0b", "x" * 5000, "file/inside", "taken"])
def test_places_where_no_schedule_can_be_saved(place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "scheduler_config.json").mkdir(parents=True)
    with pytest.raises(TsAdaptError):
        static().save_pretrained(place)
