"""What only scores: real pictures are near the judge's statistics, noise is far, other shapes are refused."""

from __future__ import annotations

import pytest
import torch

from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.features import make_extractor
from ts_adapt.evaluation.metrics import FeatureStatistics, frechet
from ts_adapt.evaluation.quality import reference_of
from ts_adapt.zoo.features import DATA, DataSet, data_of, load_features, load_judge, load_matching

KNOWN = pytest.mark.parametrize("data", DATA.values(), ids=lambda data: data.name)


@KNOWN
def test_real_pictures_are_near_their_statistics_and_noise_is_far(data: DataSet) -> None:
    extract = make_extractor("judge", shape=data.shape)
    reference = reference_of(extract, "judge", shape=data.shape)
    assert reference is not None and reference.apart
    noise = extract(torch.rand(400, *data.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    real, far = (
        frechet(FeatureStatistics.of(features), reference.statistics) for features in (reference.features, noise)
    )
    assert 0 < real < 0.1 * far


@KNOWN
def test_the_judge_shares_no_features_with_the_network_of_distances(data: DataSet) -> None:
    x = torch.rand(64, *data.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    judged, compared = load_judge(data.shape).features(x).pooled, load_features(shape=data.shape)(x).pooled
    assert judged.shape[1] != compared.shape[1]


def test_pictures_of_another_shape_are_refused_before_any_work() -> None:
    for ask in (data_of, load_judge, lambda shape: load_features(shape=shape)):
        with pytest.raises(TsAdaptError, match=r"3 x 32 x 32: use a distance without a network"):
            ask((3, 32, 32))


def test_a_caption_without_a_known_word_has_a_score_too() -> None:
    net = load_matching()
    found = net.captions(net.numbers(["qqq", "noto red heart"]))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
