"""Precision, recall, Inception score, sFID and CLIP score on sets for which they are known."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tiny_clip import tiny_clip
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.clip import clip_scorer
from ts_adapt.evaluation.features import TO_SPATIAL, WEIGHTS, Inception, looks_of
from ts_adapt.evaluation.metrics import FeatureStatistics, Manifold, frechet, inception_score
from ts_adapt.evaluation.quality import Quality, Reference, quality_of, reference_of
from ts_adapt.storage.files import read_tensors


def gaussian(n: int, seed: int = 0, shift: float = 0.0, width: int = 4) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + shift


def test_on_a_line_the_balls_are_known_by_hand() -> None:
    """Places 0, 1, 2, 10: with k = 1 the radii are 1, 1, 1, 8."""
    line = Manifold(torch.tensor([[0.0], [1.0], [2.0], [10.0]]), k=1)
    torch.testing.assert_close(line.radii, torch.tensor([1.0, 1.0, 1.0, 8.0], dtype=torch.float64))
    assert line.share(torch.tensor([[-0.9], [-1.5], [5.0], [17.9], [19.0]])) == pytest.approx(3 / 5)


def precision_and_recall(real: Tensor, samples: Tensor) -> tuple[float, float]:
    quality = quality_of({"features": samples}, len(samples), Reference(FeatureStatistics.of(real), real, True))
    assert quality.precision is not None and quality.recall is not None
    return quality.precision, quality.recall


def test_the_same_set_has_both_and_a_far_one_neither() -> None:
    real = gaussian(300)
    assert precision_and_recall(real, real) == (1, 1)
    assert precision_and_recall(real, real + 1e3) == (0, 0)


def test_lost_modes_cost_recall_and_noise_costs_precision() -> None:
    modes = torch.cat([gaussian(200, 0, -50), gaussian(200, 1, 50)])
    precision, recall = precision_and_recall(modes, gaussian(400, 2, 50))
    assert precision > 0.8 and 0.35 < recall < 0.5
    spoilt = torch.cat([modes[::2] + 1e-3, 1e3 * gaussian(200, 3)])
    precision, recall = precision_and_recall(modes, spoilt)
    assert 0.45 < precision < 0.55 and recall > 0.8


def test_two_draws_of_one_law_have_nearly_all_and_the_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    found = precision_and_recall(gaussian(500), gaussian(500, 1))
    assert min(found) > 0.85
    monkeypatch.setattr("ts_adapt.evaluation.metrics.CHUNK", 7)
    assert precision_and_recall(gaussian(500), gaussian(500, 1)) == pytest.approx(found)


def test_what_does_not_apply_is_none() -> None:
    real = gaussian(50)
    quality = quality_of({"features": gaussian(3, 1)}, 3, Reference(FeatureStatistics.of(real), real, True))
    assert quality.kid is not None
    others = (quality.precision, quality.recall, quality.inception_score, quality.sfid, quality.clip_score)
    assert others == (None,) * 5


def test_only_the_first_samples_are_looked_at() -> None:
    real, run = gaussian(60), {"features": gaussian(40, 1), "clip": torch.arange(40.0)}
    reference = Reference(FeatureStatistics.of(real), real, True)
    assert quality_of(run, 20, reference) == quality_of({name: x[:20] for name, x in run.items()}, 40, reference)
    assert quality_of(run, 20, reference).clip_score == 9.5


def test_without_real_images_there_is_what_needs_none() -> None:
    run = {"features": gaussian(40), "clip": torch.arange(40.0)}
    assert quality_of(run, 20, None) == Quality(clip_score=9.5)


def test_the_inception_score_is_the_number_of_classes_that_are_told_apart() -> None:
    sure = torch.eye(8).repeat(20, 1)
    assert inception_score(sure, parts=1) == pytest.approx(8)
    assert inception_score(torch.full((40, 8), 1 / 8)) == pytest.approx(1)
    assert inception_score(sure[:1].expand(30, -1)) == pytest.approx(1)
    half = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).repeat(10, 1)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert inception_score(half, parts=2) == pytest.approx(2 * math.exp(-entropy))
    for wrong in (torch.ones(3, 4), torch.zeros(0, 4), torch.tensor([[2.0, -1.0]])):
        with pytest.raises(TsAdaptError, match=r"rows \(n, C\) that sum to one"):
            inception_score(wrong)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 9, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Layers(nn.Module):
    """As named as Inception's; the stem halves the image until it has the size of the spatial map."""

    def __init__(self) -> None:
        super().__init__()
        for name in TO_SPATIAL[:-1]:
            self.add_module(
                name, nn.AvgPool2d(2) if name.startswith(("conv", "pool1")) and name != "conv_4" else nn.ReLU()
            )
        self.mixed_6 = Block()
        self.head = nn.Linear(9, 2048)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.conv_4(self.conv_3(self.pool0(self.conv_2(self.conv_1(self.conv(x)))))))
        x = self.mixed_5(self.mixed_4(self.mixed_3(self.mixed_2(self.mixed_1(self.mixed(x))))))
        return self.head(self.mixed_6(x).mean((2, 3)))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.output = Layers(), nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layers(x))


@pytest.fixture
def inception(tmp_path: Path) -> Inception:
    torch.manual_seed(0)
    torch.jit.script(Base()).save(str(tmp_path / WEIGHTS))
    return Inception(tmp_path, torch.device("cpu"))


def test_inceptions_probabilities_and_spatial_features_are_of_the_layers_that_are_named(inception: Inception) -> None:
    images = gaussian(5, width=3 * 20 * 20).reshape(5, 3, 20, 20).clamp(-1, 1)
    looks = looks_of(inception, images)
    torch.testing.assert_close(looks["features"], inception(images))
    assert looks["probabilities"].shape == (5, 1008)
    torch.testing.assert_close(looks["probabilities"].sum(1), torch.ones(5))
    side = 299 // 2**5
    assert looks["spatial"].shape == (5, 7 * side * side)
    logits = looks["features"] @ inception._network.base.output.weight.T
    torch.testing.assert_close(looks["probabilities"].log(), logits - logits.logsumexp(1, keepdim=True))


def test_the_clip_score_is_a_cosine_for_each_image_and_long_prompts_are_cut(tmp_path: Path, tiny: Any) -> None:
    score = clip_scorer(str(tiny_clip(tmp_path, tiny.tokenizer())))
    images = gaussian(4, width=3 * 16 * 16).reshape(4, 3, 16, 16).clamp(-1, 1)
    prompts = ["a cat", "a dog", "a cat", "a very long prompt " * 30]
    found = score(images, prompts)
    assert found.shape == (4,) and bool((found.abs() <= 1).all())
    torch.testing.assert_close(score(images[1:3], prompts[1:3]), found[1:3])
    grey = score(images[:1, :1], prompts[:1])
    torch.testing.assert_close(grey, score(images[:1, :1].expand(-1, 3, -1, -1), prompts[:1]))
    with pytest.raises(TsAdaptError, match="4 images and 1 prompts"):
        score(images, prompts[:1])


def test_clips_weights_are_never_read_from_a_pickle(tmp_path: Path, tiny: Any) -> None:
    folder = tiny_clip(tmp_path, tiny.tokenizer())
    torch.save(read_tensors(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(TsAdaptError, match="cannot be had"):
        clip_scorer(str(folder))


def test_a_file_of_moments_is_a_reference_of_the_frechet_distance_alone(tmp_path: Path) -> None:
    real, own = gaussian(200), gaussian(100, 1, 0.5)
    moments = {"mu": real.numpy().mean(0), "sigma": np.cov(real.numpy().astype(np.float64), rowvar=False)}
    np.savez(tmp_path / "real.npz", **moments)
    reference = reference_of(lambda images: images, "inception", tmp_path / "real.npz")
    assert reference is not None and not reference.apart
    expected = frechet(FeatureStatistics.of(own), FeatureStatistics.of(real))
    assert frechet(FeatureStatistics.of(own), reference.statistics) == pytest.approx(expected, rel=1e-5)
    assert quality_of({"features": own}, 100, reference) == Quality()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"mu": np.zeros(3)}, "no numbers mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"mu of \(3,\) and sigma of \(2, 2\)"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "expected finite"),
        ({"mu": np.array([{}]), "sigma": np.zeros((1, 1))}, "no numbers"),
        (b"junk", "no numbers"),
    ],
)
def test_what_are_no_moments_is_named(tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "real.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(TsAdaptError, match=rf"real.npz holds .*{said}|real.npz holds {said}"):
        reference_of(lambda images: images, "inception", path)


@pytest.mark.parametrize("shape", [b"(3,", b"(1000000000000,)", b"4"])
def test_moments_that_cannot_be_read_are_refused_whatever_reading_them_raises(tmp_path: Path, shape: bytes) -> None:
    path, archive = tmp_path / "real.npz", io.BytesIO()
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with zipfile.ZipFile(path) as kept, zipfile.ZipFile(archive, "w") as changed:
        for name in kept.namelist():
            wider = b"(3,), }".ljust(30), (shape + b", }").ljust(30)
            changed.writestr(name, kept.read(name).replace(*wider))
    for damaged in (archive.getvalue(), archive.getvalue()[:30], b""):
        path.write_bytes(damaged)
        with pytest.raises(TsAdaptError, match=r"real\.npz holds no numbers"):
            reference_of(lambda images: images, "inception", path)


def test_the_moments_of_adm_hold_spatial_ones_as_well(tmp_path: Path) -> None:
    real, own = gaussian(200).double().numpy(), gaussian(100, 1, 0.5)
    pooled = {"mu": real.mean(0), "sigma": np.cov(real, rowvar=False)}
    np.savez(tmp_path / "real.npz", **pooled, mu_s=2 * real.mean(0), sigma_s=4 * np.cov(real, rowvar=False))
    reference = reference_of(lambda images: images, "inception", tmp_path / "real.npz")
    quality = quality_of({"features": own, "spatial": own}, 100, reference)
    expected = frechet(FeatureStatistics.of(own), FeatureStatistics.of(2 * real))
    assert quality == Quality(sfid=pytest.approx(expected))


def test_clean_fids_names_lead_to_its_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def known(name: str, size: str, *, split: str) -> tuple[np.ndarray, np.ndarray]:
        asked.append((name, split, size))
        if name == "none":
            raise URLError("no such file")
        return np.arange(3.0), np.eye(3)

    monkeypatch.setattr("cleanfid.features.get_reference_statistics", known)
    reference = reference_of(lambda images: images, "inception", "clean-fid:lsun-church-train-256")
    assert reference is not None and asked == [("lsun-church", "train", "256")]
    assert reference.statistics.mean.tolist() == [0, 1, 2] and (reference.statistics.covariance == np.eye(3)).all()
    with pytest.raises(TsAdaptError, match="clean-fid has no statistics clean-fid:none-test-32"):
        reference_of(lambda images: images, "inception", "clean-fid:none-test-32")
    with pytest.raises(TsAdaptError, match="no name of clean-fid's"):
        reference_of(lambda images: images, "inception", "clean-fid:cifar10")
