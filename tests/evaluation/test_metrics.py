"""Metrics against references of their own: moments, eigenvalues, known kernels, coverage of intervals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from cleanfid.fid import frechet_distance
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from ts_adapt import zoo
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.features import folder_features, make_extractor, read_image
from ts_adapt.evaluation.metrics import FeatureStatistics, Manifold, bootstrap_interval, frechet, kid, ratio_interval
from ts_adapt.evaluation.quality import reference_of
from ts_adapt.zoo.data import to_model_range


def draw(n: int, width: int = 6, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) + shift


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 2**31))
def test_statistics_do_not_depend_on_the_parts(sizes: list[int], seed: int) -> None:
    features = draw(sum(sizes) + 2, seed=seed, shift=1e3)
    statistics = FeatureStatistics()
    for part in np.split(features, np.cumsum(sizes)):
        statistics.update(part)
    assert statistics.count == len(features)
    np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(features, rowvar=False), rtol=1e-8, atol=1e-8)


def test_statistics_come_from_moments_and_tensors_and_go_on() -> None:
    features = draw(50)
    whole = FeatureStatistics.of(features)
    part = FeatureStatistics.of(features[:20])
    restored = FeatureStatistics.from_moments(part.mean, part.covariance, 20).update(torch.from_numpy(features[20:]))
    for other in (whole, restored, FeatureStatistics.from_moments(whole.mean, whole.covariance, 50)):
        assert other.count == 50
        np.testing.assert_allclose(other.covariance, np.cov(features, rowvar=False), rtol=1e-10, atol=1e-12)


def test_statistics_are_float64_whatever_comes_in() -> None:
    features = torch.tensor([[1e4], [1e4 + 1], [1e4 + 2]], dtype=torch.float32)
    assert FeatureStatistics.of(features).covariance == pytest.approx(1.0, abs=1e-9)


def test_frechet_is_the_eigenvalue_formula() -> None:
    """tr (C1 C2)^(1/2) sums the roots of the eigenvalues of C1 C2."""
    a, b = FeatureStatistics.of(draw(400, seed=1)), FeatureStatistics.of(draw(300, seed=2, shift=0.5))
    roots = np.sqrt(np.linalg.eigvals(a.covariance @ b.covariance).real.clip(0)).sum()
    apart = a.mean - b.mean
    expected = apart @ apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * roots
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("counts", [(12, 17), (12, 300), (300, 12), (300, 280)])
def test_frechet_of_few_and_of_many_samples_is_clean_fids(counts: tuple[int, int]) -> None:
    """Fewer than the 40 features have: the covariances have no full rank, and a matrix root of them is delicate."""
    first, second = (draw(n, 40, seed=n, shift=n / 1000) for n in counts)
    a = FeatureStatistics.of(first[:5]).update(first[5:9]).update(first[9:])
    direct = frechet_distance(first.mean(0), np.cov(first, rowvar=False), second.mean(0), np.cov(second, rowvar=False))
    assert frechet(a, FeatureStatistics.of(second)) == pytest.approx(direct, rel=1e-6)


def test_frechet_of_64_pictures_is_quick_and_exact() -> None:
    """3072 features: what is shifted alone is as far as it was shifted, and two planes apart by the sum of traces."""
    features = np.random.default_rng(0).normal(size=(64, 3072))
    a, b = FeatureStatistics.of(features), FeatureStatistics.of(features + 0.5)
    assert frechet(a, b) == pytest.approx(3072 / 4)
    left, right = features.copy(), features.copy()
    left[:, 1000:], right[:, :1000] = 0, 0
    traces = np.var(left, axis=0, ddof=1).sum() + np.var(right, axis=0, ddof=1).sum()
    apart = left.mean(0) - right.mean(0)
    assert frechet(FeatureStatistics.of(left), FeatureStatistics.of(right)) == pytest.approx(apart @ apart + traces)


def test_kernel_distance_is_the_unbiased_estimator_and_leaves_the_global_generator_alone() -> None:
    a, b = draw(40, seed=1), draw(40, seed=2, shift=0.3)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def off_diagonal(k: np.ndarray) -> float:
        return float((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)))

    expected = off_diagonal(kernel(a, a)) + off_diagonal(kernel(b, b)) - 2 * kernel(a, b).mean()
    state = np.random.get_state()[1].copy()
    assert kid(a, torch.from_numpy(b), subsets=3) == pytest.approx(expected, rel=1e-9)
    assert np.array_equal(np.random.get_state()[1], state)
    assert kid(a, b, size=10, seed=1) == kid(a, b, size=10, seed=1) != kid(a, b, size=10, seed=2)


def by_formulas(a: np.ndarray, b: np.ndarray) -> tuple[float, ...]:
    """Frechet and kernel distance, precision and recall of `a` as torch-fidelity computes them, each in one line."""
    (mean_a, cov_a), (mean_b, cov_b) = ((f.mean(0), np.cov(f, rowvar=False)) for f in (a, b))
    kaa, kbb, kab = ((x @ y.T / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    n, (daa, dbb, dab) = len(a), (cdist(x, y) for x, y in ((a, a), (b, b), (a, b)))
    radii_a, radii_b = (np.sort(d, axis=1)[:, 3] for d in (daa, dbb))
    return (
        np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b) - 2 * np.trace(sqrtm(cov_a @ cov_b).real),
        (kaa.sum() - np.trace(kaa) + kbb.sum() - np.trace(kbb)) / (n * (n - 1)) - 2 * kab.sum() / n**2,
        (dab <= radii_b).any(1).mean(),
        (radii_a >= dab.T).any(1).mean(),
    )


def by_torch_fidelity(a: np.ndarray, b: np.ndarray) -> tuple[float, ...]:
    from torch_fidelity import metric_fid, metric_kid, metric_prc

    first, second = torch.from_numpy(a), torch.from_numpy(b)
    moments = [metric_fid.fid_features_to_statistics(f) for f in (first, second)]
    near = metric_prc.prc_features_to_metric(first, second, verbose=False)
    return (
        metric_fid.fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"],
        metric_kid.kid_features_to_metric(first, second, kid_subset_size=len(a), verbose=False)[
            "kernel_inception_distance_mean"
        ],
        near["precision"],
        near["recall"],
    )


@pytest.mark.parametrize("theirs", [by_formulas, pytest.param(by_torch_fidelity, marks=pytest.mark.packages)])
def test_the_measures_of_the_same_features_are_torch_fidelitys(theirs: Callable[..., tuple[float, ...]]) -> None:
    """Features of the zoo's network, of images and of others that are noised."""
    images, extract = to_model_range(zoo.test_images()[0][:600]), make_extractor("zoo")
    noise = torch.randn(300, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    noised, real = extract(images[:300] + 0.05 * noise).double(), extract(images[300:]).double()
    ours = (
        frechet(FeatureStatistics.of(noised), FeatureStatistics.of(real)),
        kid(noised, real),
        Manifold(real).share(noised),
        Manifold(noised).share(real),
    )
    assert ours == pytest.approx(theirs(noised.numpy(), real.numpy()), rel=1e-4)
    assert 0 < ours[2] < 1 and 0 < ours[3] < 1


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = bootstrap_interval(rng.exponential(size=80), level=0.9, resamples=300, seed=trial)
        hits += low < 1 < high
    assert 0.82 <= hits / 200 <= 0.95


def test_bootstrap_interval_is_that_of_the_normal_for_large_samples_and_repeats() -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap_interval(values)
    half = 1.96 * float(values.std()) / 4000**0.5
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert (low, high) == bootstrap_interval(values)
    assert (low, high) != bootstrap_interval(values, seed=1)


def test_pairing_sees_what_unpaired_intervals_hide() -> None:
    rng = np.random.default_rng(0)
    hardness = rng.exponential(scale=10, size=200)
    better = hardness + rng.normal(scale=0.1, size=200)
    worse = hardness + 0.1 + rng.normal(scale=0.1, size=200)
    assert bootstrap_interval(better)[1] > bootstrap_interval(worse)[0]
    low, high = ratio_interval(worse, better)
    assert 0 < low < worse.mean() / better.mean() - 1 < high
    assert ratio_interval(better, worse) == pytest.approx((1 / (1 + high) - 1, 1 / (1 + low) - 1), abs=1e-9)


def test_no_share_falls_by_more_than_all() -> None:
    """A few hard samples decide the mean: their resampling moves both means, not the one above the other's end."""
    rng = np.random.default_rng(0)
    before = np.where(rng.random(300) < 0.01, 10.0, 0.1)
    low, high = ratio_interval(0.1 * np.minimum(before, 0.1), before)
    assert -1 < low < high < 0


def test_the_zoo_extractor_reproduces_the_reference_on_real_images() -> None:
    extract = make_extractor("zoo")
    found = reference_of(extract, "zoo", shape=(1, 28, 28))
    data, test = found.statistics, found.features
    assert found.apart and test.shape == (5_000, 128)
    assert data.count == 60_000
    assert frechet(data, FeatureStatistics.of(test)) < 0.01


def test_extractors_see_images_as_saved_eight_bit_and_clipped() -> None:
    extract = make_extractor("zoo")
    real = to_model_range(zoo.test_images()[0][:4])
    torch.testing.assert_close(extract(real + 0.003), extract(real))
    torch.testing.assert_close(extract(3 * real), extract((3 * real).clamp(-1, 1)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, image in enumerate(zoo.test_images()[0][:5, 0].numpy()):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / str(i % 2) / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def test_features_of_a_folder_are_those_of_its_images(folder: Path) -> None:
    extract = make_extractor("zoo")
    images = to_model_range(zoo.test_images()[0][[0, 2, 4, 1, 3]])
    torch.testing.assert_close(folder_features(extract, folder, (1, 28, 28), batch_size=2), extract(images))
    found = reference_of(extract, "zoo", folder, shape=(1, 28, 28))
    assert not found.apart and found.spatial is None and found.features.shape == (5, 128)
    np.testing.assert_allclose(found.statistics.mean, extract(images).double().mean(0).numpy(), rtol=1e-5, atol=1e-7)


def test_pixels_of_a_folder_are_read_in_the_channels_of_the_model(folder: Path) -> None:
    extract = make_extractor("pixels")
    images = to_model_range(zoo.test_images()[0][[0, 2, 4, 1, 3]])
    grey = reference_of(extract, "pixels", folder, shape=(1, 28, 28))
    torch.testing.assert_close(grey.features, extract(images))
    colour = reference_of(extract, "pixels", folder, shape=(3, 28, 28))
    torch.testing.assert_close(colour.features, extract(images.expand(-1, 3, -1, -1)))


def test_images_of_another_size_than_is_compared_are_named(folder: Path) -> None:
    Image.new("L", (20, 28)).save(folder / "z.png")
    for name in ("pixels", "zoo"):
        expected = r"z\.png is of \(1, 28, 20\), the model's samples are of \(1, 28, 28\); resize the images"
        with pytest.raises(TsAdaptError, match=expected):
            reference_of(make_extractor(name), name, folder, shape=(1, 28, 28))
    with pytest.raises(TsAdaptError, match="have several sizes"):
        folder_features(make_extractor("pixels"), folder)


def test_images_of_several_sizes_are_read_one_by_one_in_colour(folder: Path) -> None:
    Image.new("RGB", (5, 7), (255, 0, 0)).save(folder / "z.png")

    def mean_colour(images: Tensor) -> Tensor:
        return images.mean((2, 3))

    features = folder_features(mean_colour, folder)
    assert features.shape == (6, 3)
    torch.testing.assert_close(features[-1], torch.tensor([1.0, -1.0, -1.0]))


def test_inception_from_a_folder_gets_resized_eight_bit_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Base(nn.Module):
        """Stands for clean-fid's network: shows what reaches it after its own normalisation."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2048, bias=False))
            self.layers[2].weight.data.fill_(1 / 3)

    torch.jit.script(Base()).save(str(tmp_path / "inception-2015-12-05.pt"))
    extract = make_extractor("inception", inception=tmp_path)
    features = extract(torch.full((2, 1, 28, 28), 0.5))
    assert features.shape == (2, 2048)
    torch.testing.assert_close(features, torch.full((2, 2048), (191 - 128) / 128), rtol=1e-3, atol=1e-3)
    with pytest.raises(TsAdaptError, match="Inception takes images"):
        extract(torch.zeros(2, 4, 28, 28))
    assert reference_of(extract, "inception") is None


def test_inception_without_weights_names_the_alternatives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TsAdaptError, match=r"has no inception-2015-12-05\.pt.*set evaluate\.features to pixels"):
        make_extractor("inception", inception=tmp_path)

    def unreachable(fpath: str) -> None:
        raise URLError("name resolution failed")

    monkeypatch.setattr("cleanfid.inception_torchscript.check_download_inception", unreachable)
    with pytest.raises(TsAdaptError, match=r"name resolution failed.*evaluate\.features to pixels .*need no network"):
        make_extractor("inception")


REFUSED: list[tuple[str, Callable[[], object]]] = [
    ("unknown feature extractor 'incepton'; did you mean 'inception'", lambda: make_extractor("incepton")),
    (r"expected \(n, D\)", lambda: FeatureStatistics.of(np.zeros(3))),
    ("NaN or infinite", lambda: FeatureStatistics.of(np.full((2, 2), np.nan))),
    ("width 3 were added to some of width 2", lambda: FeatureStatistics.of(draw(2, 2)).update(draw(2, 3))),
    ("no features yet", lambda: FeatureStatistics().mean),
    ("at least 2 features; there are 1", lambda: FeatureStatistics.of(draw(1)).covariance),
    ("widths 2 and 3", lambda: frechet(FeatureStatistics.of(draw(9, 2)), FeatureStatistics.of(draw(9, 3)))),
    (r"shapes \(4, 2\) and \(4, 3\)", lambda: kid(draw(4, 2), draw(4, 3))),
    ("n at least 1", lambda: bootstrap_interval([])),
    ("are finite", lambda: bootstrap_interval([1.0, float("inf")])),
    ("level is 95", lambda: bootstrap_interval([1.0, 2.0], level=95)),
    ("same samples; got 2 and 3", lambda: ratio_interval([1.0, 2.0], [1.0, 2.0, 3.0])),
    ("holds no images", lambda: folder_features(lambda x: x, "no/such/folder")),
]


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=[message for message, _ in REFUSED])
def test_what_cannot_be_is_refused(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(TsAdaptError, match=message):
        call()


def test_an_image_that_claims_more_than_the_memory_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(TsAdaptError, match=r"a\.png cannot be read"):
        read_image(tmp_path / "a.png")
