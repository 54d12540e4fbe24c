"""TeacherStore and generate: what is kept, what is refused, what survives."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ts_adapt import files
from ts_adapt.denoisers.analytic import GaussianDenoiser
from ts_adapt.interfaces import TimeGrid, TsAdaptError
from ts_adapt.noise import ContinuousVP, RectifiedFlow, VarianceExploding
from ts_adapt.sampling import initial_noise, integrate, noise_scale
from ts_adapt.solvers import DDIM
from ts_adapt.teacher.generate import ClassLabels, Prompts, class_labels_for, generate, teacher_config, weights_hash
from ts_adapt.teacher.store import TEST_START, TRAIN_START, TeacherStore, condition_of

SHAPE = (1, 4, 4)
NOISE = ContinuousVP()
TIMES = torch.linspace(1, 1e-3, 6, dtype=torch.float64)


def gaussian(noise: Any = NOISE, mean: float = 0.3) -> GaussianDenoiser:
    return GaussianDenoiser(noise, mean, 0.25, SHAPE)


def make(folder: Path, samples: int = 10, *, keep: bool = True, solver: Any = None, **options: Any) -> TeacherStore:
    denoiser = options.pop("denoiser", None) or gaussian()
    times = options.pop("grid", TIMES)
    save_png, condition = options.pop("save_png", False), options.get("condition")
    settings = {"model": "gaussian", "seed": 7, "first": 0, "shape": SHAPE, "shard_size": 4, "batch_size": 3} | options
    store = TeacherStore.create(folder, teacher_config(denoiser, "ddim", times, **settings))
    if keep:
        generate(
            denoiser, solver or DDIM(denoiser.noise), times, store, samples=samples,
            batch_size=settings["batch_size"], condition=condition, save_png=save_png, progress=False,
        )  # fmt: skip
    return store


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and p.name != ".lock"}


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(bytes(data))


def test_the_samples_are_the_solve_from_their_own_noise(tmp_path: Path) -> None:
    store = make(tmp_path, 10)
    assert store.indices == list(range(10)) and len(store.manifest["shards"]) == 3
    data = TeacherStore.open(tmp_path).load([9, 2, 5, 2])
    assert data["index"].tolist() == [9, 2, 5, 2] and set(data) == {"index", "x_T", "target"}
    assert torch.equal(data["x_T"], initial_noise(7, [9, 2, 5, 2], SHAPE))
    torch.testing.assert_close(data["target"], integrate(gaussian(), DDIM(NOISE), TIMES, data["x_T"]).x)
    assert store.load([])["target"].shape == (0, *SHAPE)


def test_the_trajectory_is_kept_where_asked_for(tmp_path: Path) -> None:
    data = make(tmp_path, 5, trajectory=True).load(range(5))
    assert data["trajectory"].shape == (5, 6, *SHAPE) and data["trajectory_x0"].shape == (5, 5, *SHAPE)
    assert torch.equal(data["trajectory"][:, 0], data["x_T"]) and torch.equal(data["trajectory"][:, -1], data["target"])


@pytest.mark.parametrize(
    ("noise", "expected"), [(NOISE, 1.0), (RectifiedFlow(), 1.0), (VarianceExploding(), (1 + 80.0**2) ** 0.5)]
)
def test_the_noise_has_the_scale_of_its_schedule(tmp_path: Path, noise: Any, expected: float) -> None:
    assert noise_scale(noise) == pytest.approx(expected, rel=1e-12)
    times = torch.linspace(noise.t_max, max(noise.t_min, 1e-3), 5, dtype=torch.float64)
    data = make(tmp_path, 3, denoiser=gaussian(noise), grid=times).load([1, 2])
    torch.testing.assert_close(data["x_T"], initial_noise(7, [1, 2], SHAPE) * expected)
    torch.testing.assert_close(data["target"], integrate(gaussian(noise), DDIM(noise), times, data["x_T"]).x)


def test_a_stochastic_solver_draws_from_sample_and_step(tmp_path: Path) -> None:
    first = make(tmp_path / "a", 6, solver=DDIM(NOISE, eta=1.0)).load([4])
    second = make(tmp_path / "b", 6, solver=DDIM(NOISE, eta=1.0), shard_size=5, batch_size=5).load([4])
    torch.testing.assert_close(first["target"], second["target"])


def test_more_samples_go_on_and_fewer_change_nothing(tmp_path: Path) -> None:
    make(tmp_path / "once", 11)
    make(tmp_path / "grown", 6)
    hash_before = make(tmp_path / "grown", 11).hash
    assert content(tmp_path / "grown") == content(tmp_path / "once")
    assert make(tmp_path / "grown", 3).indices == list(range(11))
    assert make(tmp_path / "grown", 11).hash == hash_before


def test_what_is_finished_is_not_solved_again(tmp_path: Path) -> None:
    make(tmp_path, 10)
    denoiser = gaussian()
    make(tmp_path, 10, denoiser=denoiser)
    assert denoiser.evaluations == 0


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "empty"])
def test_a_damaged_shard_is_named_the_rest_stays_and_generate_repairs(tmp_path: Path, harm: str) -> None:
    make(tmp_path, 10)
    before, shard = content(tmp_path), tmp_path / "shard-00001.safetensors"
    if harm == "truncate":
        shard.write_bytes(shard.read_bytes()[:-7])
    elif harm == "flip":
        flip_a_bit(shard)
    elif harm == "remove":
        shard.unlink()
    else:
        shard.write_bytes(b"")
    store = TeacherStore.open(tmp_path)
    assert store.verify() == [shard.name] and store.indices == [0, 1, 2, 3, 8, 9]
    with pytest.raises(TsAdaptError, match=r"shard-00001.safetensors .*samples 4 to 7"):
        store.load([0, 5])
    assert store.load([0, 9])["index"].tolist() == [0, 9]
    denoiser = gaussian()
    assert make(tmp_path, 10, denoiser=denoiser).verify() == [] and denoiser.evaluations == 2 * 5
    assert content(tmp_path) == before


def test_damage_is_seen_by_a_store_that_is_open(tmp_path: Path) -> None:
    store = make(tmp_path, 10)
    assert store.verify() == []
    flip_a_bit(tmp_path / "shard-00000.safetensors")
    os.utime(tmp_path / "shard-00000.safetensors", (1, 1))
    assert store.verify() == ["shard-00000.safetensors"]


def test_samples_that_are_not_there(tmp_path: Path) -> None:
    store = make(tmp_path, 10)
    for index in (10, -1, TEST_START):
        with pytest.raises(TsAdaptError, match=f"sample {index} is not in .* has 10 samples"):
            store.load([index])


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("seed", {"seed": 8}), ("times", {"grid": TIMES[1:]}), ("weights", {"denoiser": gaussian(mean=0.4)}),
        ("shard_size", {"shard_size": 5}), ("batch_size", {"batch_size": 2}), ("trajectory", {"trajectory": True}),
        ("first", {"first": 1}), ("model", {"model": "other"}), ("dtype", {"dtype": "bfloat16"}),
        ("noise", {"denoiser": gaussian(ContinuousVP(beta_1=19.0))}), ("guidance", {"guidance": 2.0}),
        ("condition", {"condition": ClassLabels(10)}),
    ],
)  # fmt: skip
def test_another_config_is_refused_by_name_and_has_another_hash(
    tmp_path: Path, key: str, changed: dict[str, Any]
) -> None:
    store = make(tmp_path / "a", 4)
    with pytest.raises(TsAdaptError, match=f"made with {key} = .* remove the folder") as error:
        make(tmp_path / "a", 4, **changed)
    assert "\n" not in str(error.value)
    other = make(tmp_path / "b", keep=False, **changed)
    assert other.hash != store.hash
    with pytest.raises(TsAdaptError, match=key):
        TeacherStore.open(tmp_path / "a", other.config)
    assert TeacherStore.open(tmp_path / "a", store.config).indices == [0, 1, 2, 3]


def test_the_last_bit_of_a_time_is_no_other_config(tmp_path: Path) -> None:
    make(tmp_path, 4)
    assert make(tmp_path, 4, grid=TIMES * (1 + 2e-16)).indices == [0, 1, 2, 3]


def test_versions_are_recorded_but_not_hashed(tmp_path: Path) -> None:
    store = make(tmp_path, 4)
    assert store.manifest["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    files.write_json(tmp_path / "manifest.json", manifest)
    assert TeacherStore.open(tmp_path).hash == store.hash


def test_manifests_that_are_missing_damaged_or_altered(tmp_path: Path) -> None:
    config, path = make(tmp_path, 4).config, tmp_path / "manifest.json"
    whole = path.read_text()
    for text, said in (
        (whole[:-30], "damaged"),
        (whole.replace('"seed": 7', '"seed": 8'), "altered"),
        (whole.replace("shard-00000", "../shard-00000"), "no shard"),
        (whole.replace('"version": 1', '"version": 99'), "version 1"),
        (whole.replace('"samples": 4', '"samples": "four"'), "expected int"),
    ):
        path.write_text(text)
        with pytest.raises(TsAdaptError, match=said):
            TeacherStore.open(tmp_path)
    path.unlink()
    with pytest.raises(TsAdaptError, match="no teacher in"):
        TeacherStore.open(tmp_path)
    with pytest.raises(TsAdaptError, match=r"no manifest\.json"):
        TeacherStore.create(tmp_path, config)
    with pytest.raises(TsAdaptError, match="no 'weights'"):
        TeacherStore.create(tmp_path / "new", {k: v for k, v in config.items() if k != "weights"})
    with pytest.raises(TsAdaptError, match="at least 1"):
        TeacherStore.create(tmp_path / "new", config | {"shard_size": 0})
    for shape in ([1, 4.5], [0, 4], [2**20, 2**20], ["4"]):
        with pytest.raises(TsAdaptError, match=r"shape is .* expected sizes"):
            TeacherStore.create(tmp_path / "new", config | {"shape": shape})


def test_shards_of_several_teachers_are_not_mixed(tmp_path: Path) -> None:
    store = make(tmp_path, 8)
    path = tmp_path / "shard-00001.safetensors"
    checksum = files.write_tensors(path, {**files.read_tensors(path), "class_labels": torch.arange(4)})
    store.manifest["shards"][path.name]["sha256"] = checksum
    assert store.load([0, 1])["index"].tolist() == [0, 1] and store.load([5])["class_labels"].tolist() == [1]
    with pytest.raises(TsAdaptError, match="of several teachers"):
        store.load([0, 5])


def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "whole", 10)
    temporary = files._temporary

    def full(path: Path) -> Path:
        if path.name != "shard-00001.safetensors":
            return temporary(path)
        link = path.with_name(".full.tmp")
        link.symlink_to("/dev/full")
        return link

    with monkeypatch.context() as patch:
        patch.setattr(files, "_temporary", full)
        with pytest.raises(TsAdaptError, match="disk is full"):
            make(tmp_path / "short", 10)
    assert TeacherStore.open(tmp_path / "short").indices == [0, 1, 2, 3]
    make(tmp_path / "short", 10)
    assert content(tmp_path / "short") == content(tmp_path / "whole")


def test_two_processes_on_one_folder(tmp_path: Path) -> None:
    store = make(tmp_path, 4)
    with store.writing(), pytest.raises(TsAdaptError, match=f"in use by another process .process {os.getpid()}"):
        make(tmp_path, 10)
    assert len(make(tmp_path, 10).indices) == 10


def test_training_never_reaches_the_noises_of_the_test(tmp_path: Path) -> None:
    assert TRAIN_START < TEST_START
    with pytest.raises(TsAdaptError, match="at most 4 can be had"):
        make(tmp_path / "train", 5, first=TEST_START - 4)
    assert make(tmp_path / "last", 4, first=TEST_START - 4).indices == list(range(TEST_START - 4, TEST_START))
    assert make(tmp_path / "test", 5, first=TEST_START).indices == list(range(TEST_START, TEST_START + 5))


def test_arguments_that_are_not_the_configs(tmp_path: Path) -> None:
    store = make(tmp_path, keep=False)

    def run(denoiser: Any = None, grid: Any = TIMES, **changed: Any) -> None:
        denoiser = denoiser or gaussian()
        options = {"samples": 4, "batch_size": 3, "progress": False} | changed
        generate(denoiser, DDIM(denoiser.noise), grid, store, **options)

    others: dict[str, dict[str, Any]] = {
        "batch_size": {"batch_size": 4},
        "condition": {"condition": ClassLabels(3)},
        "times": {"grid": TIMES[1:]},
        "noise_scale": {"denoiser": gaussian(VarianceExploding())},
    }
    for key, changed in others.items():
        with pytest.raises(TsAdaptError, match=key):
            run(**changed)
    with pytest.raises(TsAdaptError, match="at least 1"):
        run(samples=0)
    for grid in (TIMES.expand(2, -1), TimeGrid(TIMES, output_scale=torch.ones(5))):
        with pytest.raises(TsAdaptError, match="one plain time grid"):
            run(grid=grid)


class Shifted(GaussianDenoiser):
    """A Gaussian whose mean is its condition."""

    def __call__(self, x_t: Tensor, t: Tensor, **condition: Any) -> Tensor:
        shift = condition["class_labels"] if "class_labels" in condition else condition["added"]["embedding"]
        return super().__call__(x_t, t) + shift.reshape(-1, 1, 1, 1)


def test_class_labels_are_a_function_of_seed_and_index(tmp_path: Path) -> None:
    labels = ClassLabels(10)
    data = make(tmp_path, 10, denoiser=Shifted(NOISE, 0.3, 0.25, SHAPE), condition=labels).load(range(10))
    assert torch.equal(data["class_labels"], labels.draw(7, range(10))["class_labels"])
    assert torch.equal(data["class_labels"][3:5], labels.draw(7, [3, 4])["class_labels"])
    again = integrate(Shifted(NOISE, 0.3, 0.25, SHAPE), DDIM(NOISE), TIMES, data["x_T"], condition=condition_of(data))
    torch.testing.assert_close(data["target"], again.x)


def test_class_labels_are_uniform_and_independent_of_the_noise() -> None:
    labels = ClassLabels(10).draw(0, range(4000))["class_labels"]
    assert (torch.bincount(labels, minlength=10) - 400).abs().max() < 80
    x_T = initial_noise(0, range(4000), (1,))[:, 0]
    assert abs(float(torch.corrcoef(torch.stack([x_T, labels.float()]))[0, 1])) < 0.06
    assert ClassLabels(10, label=3).draw(0, range(4))["class_labels"].tolist() == [3] * 4
    with pytest.raises(TsAdaptError, match="classes 0 to 9"):
        ClassLabels(10, label=10)


def test_which_labels_a_denoiser_wants() -> None:
    denoiser = gaussian()
    assert class_labels_for(denoiser) is None
    with pytest.raises(TsAdaptError, match="no classes"):
        class_labels_for(denoiser, 3)
    denoiser.null_condition = {"class_labels": 10}  # type: ignore[attr-defined]
    found = class_labels_for(denoiser, 3)
    assert found is not None and found.describe() == {"kind": "class_labels", "classes": 10, "label": 3}


def test_prompts_go_around_and_nested_conditions_return(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\n\nbb\nccc\n")
    prompts = Prompts.read(
        tmp_path / "prompts.txt", lambda texts: {"added.embedding": torch.tensor([len(t) for t in texts])}
    )
    data = make(tmp_path / "t", 5, denoiser=Shifted(NOISE, 0.3, 0.25, SHAPE), condition=prompts).load(range(5))
    assert data["prompt_index"].tolist() == [0, 1, 2, 0, 1]
    condition = condition_of(data)
    assert list(condition) == ["added"] and condition["added"]["embedding"].tolist() == [1, 2, 3, 1, 2]
    with pytest.raises(TsAdaptError, match="entry of"):
        condition_of({"a": torch.ones(1), "a.b": torch.ones(1)})
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(TsAdaptError, match="no prompts"):
        Prompts.read(tmp_path / "none.txt", lambda texts: {})
    with pytest.raises(TsAdaptError, match="there is no file"):
        Prompts.read(tmp_path / "absent.txt", lambda texts: {})


def test_png_files_are_written_and_missing_ones_made_up(tmp_path: Path) -> None:
    store = make(tmp_path, 6, save_png=True)
    paths = sorted((tmp_path / "images").iterdir())
    assert [p.name for p in paths] == [f"{i:06d}.png" for i in range(6)]
    expected = ((store.load([2])["target"][0, 0].clamp(-1, 1) + 1) * 127.5).round()
    assert np.array_equal(np.asarray(Image.open(paths[2])), expected.numpy().astype("uint8"))
    paths[4].unlink()
    make(tmp_path, 6, save_png=True)
    assert paths[4].exists()


def test_progress_shows_rate_and_remaining_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, denoiser = make(tmp_path, keep=False), gaussian()
    generate(denoiser, DDIM(NOISE), TIMES, store, samples=6, batch_size=3)
    shown = capsys.readouterr().err
    assert "6/6" in shown and "sample/s" in shown and "00:0" in shown


def test_weights_hash_sees_every_parameter() -> None:
    class Holder:
        def __init__(self, network: torch.nn.Module) -> None:
            self.network = network

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    before = weights_hash(Holder(network))  # type: ignore[arg-type]
    assert before == weights_hash(Holder(network))  # type: ignore[arg-type]
    network[1].running_mean[0] = 1.0  # type: ignore[index]
    assert weights_hash(Holder(network)) != before  # type: ignore[arg-type]
    assert weights_hash(gaussian(mean=0.1)) != weights_hash(gaussian(mean=0.2))
