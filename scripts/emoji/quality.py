"""How good a pipeline's pictures are, beside real ones of the same captions, to networks that taught it nothing.

    frechet       to the statistics of the judge's file, in the judge's features
    right of 64   how often the dual encoder finds a picture's own caption among 64

Either of the pictures that these statistics leave out, most of which all trainings saw, or of those that none of them
saw.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from emoji.data import Data
from emoji.judges import APART
from emoji.making import BATCH, load, made
from emoji.matching import found
from ts_adapt.evaluation.metrics import FeatureStatistics, frechet
from ts_adapt.zoo.data import to_model_range
from ts_adapt.zoo.features import EMOJI, judged, load_judge, load_matching


def quality(
    data: Data, pipeline: Path, networks: Path, count: int, steps: int, guidance: float, seed: int, held_out: bool
) -> dict[str, dict[str, float]]:
    """The measures of at most `count` real pictures, and of those made in their place; see the module's head.

    networks  folder of the folders judge and matching, as their trainings write them
    """
    apart = [row for row, entry in enumerate(data.entries) if (entry.held_out if held_out else row % APART == 0)]
    rows = apart[:count]
    captions = [data.entries[row].caption for row in rows]
    judge, encoder = load_judge(EMOJI.shape, folder=networks / "judge"), load_matching(networks / "matching")
    known = judged(EMOJI.shape, networks / "judge")
    statistics = FeatureStatistics.from_moments(known["mean"], known["covariance"], int(known["count"][0]))

    @torch.no_grad()
    def measured(x: Tensor) -> dict[str, float]:
        features = torch.cat([judge.features(part).pooled for part in x.split(BATCH)])
        right = found(encoder, x, encoder.numbers(captions))
        return {"frechet": frechet(FeatureStatistics.of(features), statistics), "right of 64": right}

    real = to_model_range(data.pictures[rows])
    return {"real": measured(real), "made": measured(made(load(pipeline), captions, steps, guidance, seed))}
