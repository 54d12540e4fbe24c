"""Every pipeline class of diffusers on a grid: as diffusers' own scheduler on that grid, or refused when attached."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_zoo.building import classes
from diffusers_zoo.trial import learning, own_times, shared_times
from ts_adapt.errors import TsAdaptError
from ts_adapt.schedulers.plan import usual_lists
from ts_adapt.schedulers.scheduler import LearnedScheduler

HONEST = ("equal", "refused", "no gradient", "not built", "not run")
"""How a trial may end: what the tests cannot build, or diffusers not run, is no fault of ours."""
SHARED = (
    "BriaPipeline", "CogView4Pipeline", "FluxKontextPipeline", "HunyuanDiTPipeline",
    "IFPipeline", "KandinskyV22CombinedPipeline", "LTXPipeline", "MochiPipeline",
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
LEAST, LEARNED = 185, 110
"""How many classes are equal with shared times, and how many are learned on."""


@pytest.mark.parametrize("name", SHARED)
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
    found = {name: (shared_times(name), own_times(name), learning(name)) for name in classes()}
    bad = {name: outcomes for name, outcomes in found.items() if any(one.kind not in HONEST for one in outcomes)}
    assert not bad
    assert sum(shared.kind == "equal" for shared, *_ in found.values()) >= LEAST
    assert sum(learned.kind == "equal" for *_, learned in found.values()) >= LEARNED


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_pipeline_asks_of_its_scheduler_and_ours_has_not(name: str) -> None:
    outcome = shared_times(name)
    assert outcome.kind == "refused" and re.search(REFUSED[name], outcome.words)


def test_lists_that_pipelines_give_by_themselves_stand_for_their_number() -> None:
    """Those of the user are kept; a list that the pipeline's call does not take can only be the pipeline's."""
    schedule = LearnedScheduler.from_grid("karras", "ddim", FlowMatchEulerDiscreteScheduler().config)
    schedule.set_timesteps(4)
    own, given = schedule.timesteps, [1.0, 0.7, 0.3, 0.1]
    for usual in usual_lists(4, 1000.0):
        schedule.set_timesteps(sigmas=usual, timesteps=[1000 * sigma for sigma in usual])
        assert torch.equal(schedule.timesteps, own)
    schedule.set_timesteps(sigmas=given)
    torch.testing.assert_close(schedule.timesteps, 1000 * torch.tensor(given))
    schedule.lists = ("timesteps",)
    schedule.set_timesteps(sigmas=given)
    assert torch.equal(schedule.timesteps, own)


def test_a_run_that_goes_on_from_another_pipelines_states(tiny: Any) -> None:
    """As with `denoising_start`: where a predictor gave them their times, nobody knows those any more."""
    schedule = tiny.schedule("recursive", tiny.betas().config, (4, 8, 8))
    schedule.continues, x = True, torch.randn(2, 4, 8, 8)
    schedule.set_timesteps(4)
    schedule.set_begin_index(2)
    with pytest.raises(TsAdaptError, match="denoising_start"):
        schedule.network_timesteps(x)
    schedule.set_timesteps(4)
    schedule.set_begin_index(2)
    schedule.add_noise(x, x, schedule.timesteps[2:3])
    assert schedule.network_timesteps(x).shape == (2,)
