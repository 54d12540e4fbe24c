"""Every pipeline class of diffusers on a grid: as diffusers' own scheduler on that grid, or refused when attached."""

from __future__ import annotations

import pytest

from diffusers_zoo.building import classes
from diffusers_zoo.trial import own_times, shared_times

HONEST = ("equal", "refused", "not built", "not run")
"""How a trial may end: what the tests cannot build, or diffusers not run, is no fault of ours."""
SHARED = (
    "BriaPipeline", "CogView4Pipeline", "CycleDiffusionPipeline", "FluxKontextPipeline", "HunyuanDiTPipeline",
    "IFPipeline", "KandinskyV22CombinedPipeline", "LTXPipeline", "LatentConsistencyModelPipeline", "MochiPipeline",
    "PixArtAlphaPipeline", "QwenImagePipeline", "SanaPipeline", "StableDiffusion3Pipeline",
    "StableDiffusionControlNetPipeline", "StableDiffusionXLPipeline", "VisualClozePipeline", "ZImagePipeline",
)  # fmt: skip
"""One of each kind of loop."""
OWN = (
    "FluxImg2ImgPipeline", "LTXImageToVideoPipeline", "Lumina2Pipeline", "SkyReelsV2DiffusionForcingPipeline",
    "StableDiffusionControlNetPipeline", "StableDiffusionImg2ImgPipeline", "WanPipeline", "ZImagePipeline",
)  # fmt: skip
REFUSED = {
    "CycleDiffusionPipeline": "asks its scheduler for _get_variance, alphas_cumprod",
    "LatentConsistencyModelPipeline": r"asks its scheduler for set_timesteps\(original_inference_steps=...\)",
}
LEAST = 170
"""How many classes are equal with shared times."""


@pytest.mark.parametrize("name", [name for name in SHARED if name not in REFUSED])
def test_a_grid_is_kept(name: str) -> None:
    outcome = shared_times(name)
    assert outcome.kind == "equal", outcome.words


@pytest.mark.parametrize("name", OWN)
def test_a_grid_for_each_sample(name: str) -> None:
    outcome = own_times(name)
    assert outcome.kind in ("equal", "refused"), outcome.words
    assert (outcome.kind == "refused") == (name == "SkyReelsV2DiffusionForcingPipeline"), outcome.words


@pytest.mark.slow
def test_no_class_is_silently_wrong_or_fails_after_it_was_accepted() -> None:
    found = {name: (shared_times(name), own_times(name)) for name in classes()}
    bad = {name: both for name, both in found.items() if any(one.kind not in HONEST for one in both)}
    assert not bad
    assert sum(shared.kind == "equal" for shared, _ in found.values()) >= LEAST
