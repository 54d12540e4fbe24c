"""generate: every sample is the solve from its own noise and condition; labels, prompts, pictures, progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from small_teacher import NOISE, SHAPE, TIMES, gaussian, make
from ts_adapt.denoisers.analytic import GaussianDenoiser
from ts_adapt.denoisers.guidance import Guided
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import TimeGrid
from ts_adapt.noise import RectifiedFlow, VarianceExploding
from ts_adapt.prompts import read_prompts
from ts_adapt.sampling import initial_noise, integrate, noise_scale
from ts_adapt.solvers import DDIM
from ts_adapt.teacher.generate import (
    ClassLabels,
    Prompts,
    Scales,
    Together,
    class_labels_for,
    classes_of,
    generate,
    weights_hash,
)
from ts_adapt.teacher.store import TeacherStore, condition_of


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
    ("noise_schedule", "expected"), [(NOISE, 1.0), (RectifiedFlow(), 1.0), (VarianceExploding(), (1 + 80.0**2) ** 0.5)]
)
def test_the_noise_has_the_scale_of_its_schedule(tmp_path: Path, noise_schedule: Any, expected: float) -> None:
    assert noise_scale(noise_schedule) == pytest.approx(expected, rel=1e-12)
    times = torch.linspace(noise_schedule.t_max, max(noise_schedule.t_min, 1e-3), 5, dtype=torch.float64)
    data = make(tmp_path, 3, denoiser=gaussian(noise_schedule), grid=times).load([1, 2])
    torch.testing.assert_close(data["x_T"], initial_noise(7, [1, 2], SHAPE) * expected)
    torch.testing.assert_close(
        data["target"], integrate(gaussian(noise_schedule), DDIM(noise_schedule), times, data["x_T"]).x
    )


def test_a_stochastic_solver_draws_from_sample_and_step(tmp_path: Path) -> None:
    first = make(tmp_path / "a", 6, solver=DDIM(NOISE, eta=1.0)).load([4])
    second = make(tmp_path / "b", 6, solver=DDIM(NOISE, eta=1.0), shard_size=5, batch_size=5).load([4])
    torch.testing.assert_close(first["target"], second["target"])


def test_arguments_that_are_not_the_configs(tmp_path: Path) -> None:
    store = make(tmp_path, keep=False)

    def run(denoiser: Any = None, grid: Any = TIMES, **changed: Any) -> None:
        denoiser = denoiser or gaussian()
        options = {"samples": 4, "batch_size": 3, "progress": False} | changed
        generate(denoiser, DDIM(denoiser.noise_schedule), grid, store, **options)

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


def test_scales_of_guidance_are_log_uniform_and_a_function_of_seed_and_index() -> None:
    source = Scales(1.5, 8.0)
    drawn = source.draw(0, range(4000))["guidance_scale"]
    assert drawn.dtype == torch.float64 and 1.5 <= float(drawn.min()) < 1.51 and 7.9 < float(drawn.max()) <= 8
    share = (drawn / 1.5).log() / torch.tensor(8 / 1.5).log()
    assert [float(share.quantile(q)) for q in (0.25, 0.5, 0.75)] == pytest.approx([0.25, 0.5, 0.75], abs=0.02)
    assert torch.equal(source.draw(0, [3000, 7, 50_001])["guidance_scale"][:2], drawn[[3000, 7]])
    assert not torch.equal(source.draw(1, range(9))["guidance_scale"], drawn[:9])
    labels = ClassLabels(10).draw(0, range(4000))["class_labels"].double()
    assert abs(float(torch.corrcoef(torch.stack([share, labels]))[0, 1])) < 0.05
    assert Scales(-2.0, -2.0).draw(0, range(3))["guidance_scale"].tolist() == [-2.0] * 3


def test_classes_are_known_among_other_things_that_samples_have() -> None:
    both = Together([Scales(1.5, 8.0), ClassLabels(7)])
    assert [classes_of(each) for each in (None, Scales(1, 2).describe(), both.describe())] == [0, 0, 7]


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
    texts = read_prompts(tmp_path / "prompts.txt")
    prompts = Prompts(texts, lambda texts: {"added.embedding": torch.tensor([len(t) for t in texts])})
    data = make(tmp_path / "t", 5, denoiser=Shifted(NOISE, 0.3, 0.25, SHAPE), condition=prompts).load(range(5))
    assert data["prompt_index"].tolist() == [0, 1, 2, 0, 1]
    condition = condition_of(data)
    assert list(condition) == ["added"] and condition["added"]["embedding"].tolist() == [1, 2, 3, 1, 2]
    with pytest.raises(TsAdaptError, match="entry of"):
        condition_of({"a": torch.ones(1), "a.b": torch.ones(1)})
    with pytest.raises(TsAdaptError, match="give at least one"):
        Prompts([], lambda texts: {})


def test_png_files_are_written_and_missing_ones_made_up(tmp_path: Path) -> None:
    store = make(tmp_path, 6, save_png=True)
    paths = sorted((tmp_path / "images").iterdir())
    assert [p.name for p in paths] == [f"{i:06d}.png" for i in range(6)]
    expected = ((store.load([2])["target"][0, 0].clamp(-1, 1) + 1) * 127.5).round()
    assert np.array_equal(np.asarray(Image.open(paths[2])), expected.numpy().astype("uint8"))
    paths[4].unlink()
    make(tmp_path, 6, save_png=True)
    assert paths[4].exists()


def test_samples_that_are_no_images_are_refused_before_any_is_solved(tmp_path: Path) -> None:
    denoiser = GaussianDenoiser(NOISE, 0.3, 0.25, (2,))
    with pytest.raises(TsAdaptError, match=r"shape \(2,\) are no images"):
        make(tmp_path, 3, denoiser=denoiser, shape=(2,), save_png=True)
    assert denoiser.evaluations == 0


def test_progress_shows_rate_and_remaining_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, denoiser = make(tmp_path, keep=False), gaussian()
    generate(denoiser, DDIM(NOISE), TIMES, store, samples=6, batch_size=3)
    shown = capsys.readouterr().err
    assert "6/6" in shown and "sample/s" in shown and "00:0" in shown


def test_weights_hash_sees_every_parameter() -> None:
    class Holder:
        parts: dict[str, torch.nn.Module] = {}  # noqa: RUF012

        def __init__(self, network: torch.nn.Module) -> None:
            self.network = network

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    before = weights_hash(Holder(network))  # type: ignore[arg-type]
    assert before == weights_hash(Holder(network))  # type: ignore[arg-type]
    network[1].running_mean[0] = 1.0  # type: ignore[index]
    assert weights_hash(Holder(network)) != before  # type: ignore[arg-type]
    for around in (lambda inner: inner, lambda inner: Guided(inner, 2.0, {"class_labels": 0})):
        assert weights_hash(around(gaussian(mean=0.1))) != weights_hash(around(gaussian(mean=0.2)))
