"""How good a pipeline's pictures are, beside real ones of the same captions, as networks see them that no training saw.

frechet       to the statistics of the other real pictures, in the judge's features
right of 64   how often the dual encoder finds a picture's own caption among 64
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from emoji.data import Data, in_model_range
from emoji.judges import APART
from emoji.matching import found
from emoji.sheet import load
from ts_adapt.evaluation.metrics import FeatureStatistics, frechet
from ts_adapt.storage.files import read_tensors
from ts_adapt.zoo.features import EMOJI, JUDGED, load_judge, load_matching

BATCH = 32


def quality(
    data: Data, pipeline: Path, networks: Path, count: int, steps: int, guidance: float, seed: int
) -> dict[str, dict[str, float]]:
    """The measures of `count` of the pictures that the judge's statistics leave out, and of those made in their place.

    networks  folder of the folders judge and matching, as their trainings write them
    """
    rows = list(range(0, len(data.entries), APART))[:count]
    captions = [data.entries[row].caption for row in rows]
    judge, encoder = load_judge(EMOJI.shape, folder=networks / "judge"), load_matching(networks / "matching")
    known = read_tensors(networks / "judge" / JUDGED)
    statistics = FeatureStatistics.from_moments(
        known["mean"].numpy(), known["covariance"].numpy(), int(known["count"][0])
    )

    @torch.no_grad()
    def measured(x: Tensor) -> dict[str, float]:
        features = torch.cat([judge.features(part).pooled for part in x.split(BATCH)])
        right = found(encoder, x, encoder.numbers(captions))
        return {"frechet": frechet(FeatureStatistics.of(features), statistics), "right of 64": right}

    real = in_model_range(data.pictures[rows])
    return {"real": measured(real), "made": measured(made(pipeline, captions, steps, guidance, seed))}


def made(pipeline: Path, captions: list[str], steps: int, guidance: float, seed: int) -> Tensor:
    """Pictures `(n, 3, 64, 64)` in [-1, 1] of the captions; the noise of each is of a seed of its own."""
    pipe, pictures = load(pipeline), []
    for start in tqdm(range(0, len(captions), BATCH), unit="batch"):
        part = captions[start : start + BATCH]
        generators = [torch.Generator().manual_seed(seed + start + number) for number in range(len(part))]
        images = pipe(part, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="pt")
        pictures.append(2 * images.images.float() - 1)
    return torch.cat(pictures)
