"""A sample of a pipeline has its own picture, its own draws and its own ending, whatever is beside it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ts_adapt.assembly import build_solver
from ts_adapt.evaluation.side_by_side import compare
from ts_adapt.grids import fixed
from ts_adapt.interfaces import TsAdaptError
from ts_adapt.pipelines.denoiser import PipelineDenoiser
from ts_adapt.pipelines.draws import OwnDraws
from ts_adapt.sampling import initial_noise, integrate

STEPS = 2
PROMPTS = ["a cat", "the big dog", "nothing"]
DRAWING = {"FluxControlPipeline": False, "StableDiffusion3ControlNetPipeline": True}
"""Pipelines that draw the latents of their pictures, by generators or, True, without."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(("red", "white")):
        Image.new("RGB", (16, 16), colour).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module", params=DRAWING)
def drawing(request: Any) -> tuple[PipelineDenoiser, bool]:
    pipe = import_module("diffusers_zoo.building").pipeline(request.param)
    given = import_module("diffusers_zoo.calling").arguments(pipe, [0])
    taken = ("control_image", "height", "width", "max_sequence_length", "use_resolution_binning")
    call = {key: given[key] for key in taken if key in given}
    return PipelineDenoiser(pipe, call), DRAWING[request.param]


def ends(denoiser: PipelineDenoiser, index: list[int], numbers: list[int]) -> Tensor:
    grid, solver = fixed.make("karras", denoiser.noise_schedule, STEPS), build_solver("ddim", denoiser.noise_schedule)
    condition = {**denoiser.encode([PROMPTS[i] for i in index]), "number": torch.tensor(numbers)}
    with torch.no_grad():
        return integrate(denoiser, solver, grid, initial_noise(0, index, denoiser.shape), condition=condition).x


def test_a_sample_has_the_draws_of_its_number(drawing: tuple[PipelineDenoiser, bool]) -> None:
    denoiser, freely = drawing
    assert denoiser.numbered is not None and denoiser._draws_freely is freely
    together = ends(denoiser, [0, 1, 2], [5, 6, 7])
    alone = ends(denoiser, [1], [6])
    assert torch.allclose(alone, together[1:2], rtol=1e-4, atol=1e-5)
    assert torch.allclose(ends(denoiser, [2, 1], [7, 6]), together[[2, 1]], rtol=1e-4, atol=1e-5)
    assert (ends(denoiser, [1], [7]) - alone).abs().max() > 10 * (together[1:2] - alone).abs().max()


def test_what_draws_nothing_has_no_numbers(tiny: Any) -> None:
    denoiser = PipelineDenoiser(tiny.pipeline("sd"))
    assert denoiser.numbered is None and not denoiser._draws_freely


def test_rows_are_drawn_by_number_and_what_has_none_alike() -> None:
    def drawn(numbers: list[int]) -> list[Tensor]:
        torch.manual_seed(3)
        with OwnDraws(numbers) as own:
            once, many = torch.rand(4, 5), torch.randn(2 * len(numbers), 3, 2)
            like = torch.rand_like(many.double())
            given = torch.randn(2, generator=torch.Generator().manual_seed(1))
        assert own.free and own.count == 2 * many.numel() + once.numel() + 2
        assert torch.equal(given, torch.randn(2, generator=torch.Generator().manual_seed(1)))
        return [many, like, once]

    two, one = drawn([4, 9]), drawn([9])
    assert torch.equal(two[0][1::2], one[0]) and torch.equal(two[1][1::2], one[1])
    assert two[1].dtype == torch.float64 and two[1].min() >= 0 and not torch.equal(two[0][:2], two[0][2:])
    assert torch.equal(two[2], one[2])


def test_a_state_is_decoded_with_its_own_picture(tiny: Any, pictures: Path) -> None:
    from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline

    class Told(AutoencoderKL):
        """What it decodes is as bright as what it has encoded."""

        def encode(self, x: Tensor, **options: Any) -> Any:
            self.told = x.mean((1, 2, 3), keepdim=True)
            return super().encode(x, **options)

        def decode(self, z: Tensor, **options: Any) -> Any:
            return (super().decode(z, return_dict=False)[0] + self.told,)

    vae = tiny.vae()
    vae.__class__ = Told
    pipe = StableDiffusionInstructPix2PixPipeline(
        vae=vae, text_encoder=tiny.clip(), tokenizer=tiny.tokenizer(), unet=tiny.text_unet(in_channels=8),
        scheduler=tiny.betas(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    denoiser = PipelineDenoiser(pipe, {"image": str(pictures)})
    x = initial_noise(0, range(3), denoiser.shape)
    condition = {**denoiser.encode(PROMPTS), "number": torch.tensor([0, 1, 3])}
    found = denoiser.decode(x, condition)
    alone = [denoiser.decode(x[i : i + 1], {key: value[i : i + 1] for key, value in condition.items()}) for i in (0, 1)]
    assert torch.allclose(found[:2], torch.cat(alone), atol=1e-5)
    other = denoiser.decode(x, {**condition, "number": torch.tensor([0, 0, 1])})
    brighter = (1.0 - -1 / 3) * torch.tensor([0.0, 1.0, 0.0])  # white, where red is given
    assert torch.allclose((found - other).mean((1, 2, 3)), brighter, atol=1e-4)
    with pytest.raises(TsAdaptError, match="number"):
        denoiser.decode(x)
    sides = compare(denoiser, ["uniform"], steps=2, samples=3, teacher_steps=3, condition=denoiser.encode(PROMPTS))
    assert sides.sides[0].distance > 0
