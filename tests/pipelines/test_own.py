"""A sample of a pipeline has its own picture, its own draws and its own ending, whatever is beside it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ts_adapt.assembly import build_solver
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.side_by_side import compare
from ts_adapt.grids import fixed
from ts_adapt.pipelines.denoiser import PipelineDenoiser
from ts_adapt.pipelines.draws import Kinds, OwnDraws, generators
from ts_adapt.pipelines.start import form_of
from ts_adapt.sampling import initial_noise, integrate, noise_for
from ts_adapt.teacher.generate import LABEL_STREAM, Numbers

STEPS = 2
PROMPTS = ["a cat", "the big dog", "nothing"]
DRAWING = {"FluxControlPipeline": False, "StableDiffusion3ControlNetPipeline": True}
"""Pipelines that draw the latents of their pictures, by generators or, True, without."""


@pytest.fixture(scope="module", params=DRAWING)
def drawing(request: Any) -> tuple[PipelineDenoiser, bool]:
    pipe = import_module("diffusers_zoo.building").pipeline(request.param)
    given = import_module("diffusers_zoo.calling").arguments(pipe, [0])
    taken = ("control_image", "height", "width", "max_sequence_length", "use_resolution_binning")
    call = {key: given[key] for key in taken if key in given}
    return PipelineDenoiser(pipe, call), DRAWING[request.param]


def ends(denoiser: PipelineDenoiser, index: list[int], numbers: list[int], seed: int = 0) -> Tensor:
    grid, solver = fixed.make("karras", denoiser.noise_schedule, STEPS), build_solver("ddim", denoiser.noise_schedule)
    condition = {**denoiser.encode([PROMPTS[i] for i in index]), **Numbers("").draw(seed, numbers)}
    with torch.no_grad():
        return integrate(denoiser, solver, grid, initial_noise(0, index, denoiser.shape), condition=condition).x


def test_a_sample_has_the_draws_of_its_number(drawing: tuple[PipelineDenoiser, bool]) -> None:
    denoiser, freely = drawing
    assert denoiser.numbered is not None and denoiser._draws_freely is freely
    together = ends(denoiser, [0, 1, 2], [5, 6, 7])
    alone = ends(denoiser, [1], [6])
    assert torch.allclose(alone, together[1:2], rtol=1e-4, atol=1e-5)
    assert torch.allclose(ends(denoiser, [2, 1], [7, 6]), together[[2, 1]], rtol=1e-4, atol=1e-5)
    for other in (ends(denoiser, [1], [7]), ends(denoiser, [1], [6], seed=1)):
        assert (other - alone).abs().max() > 10 * (together[1:2] - alone).abs().max()
    assert torch.equal(ends(denoiser, [1], [6], seed=1), ends(denoiser, [1], [6], seed=1))


def test_what_draws_nothing_has_no_numbers(tiny: Any) -> None:
    denoiser = PipelineDenoiser(tiny.pipeline("sd"))
    assert denoiser.numbered is None and not denoiser._draws_freely


def test_rows_are_drawn_by_number_and_what_has_none_alike() -> None:
    one, two = (
        [torch.Size(shape) for shape in ((2, 5), (2, 5, 5), (2, 3, 4, 4), (n, 3, 2), (n, 3), (n,))] for n in (1, 2)
    )
    kinds = Kinds.of(one, two)
    assert kinds.own == {(1, 3, 2), (1, 3), (1,)} and kinds.shared == {(2, 5), (2, 5, 5), (2, 3, 4, 4)}
    assert Kinds.of(one, None).own == kinds.own

    def drawn(numbers: list[int]) -> list[Tensor]:
        torch.manual_seed(3)
        with OwnDraws([(0, number) for number in numbers], kinds) as own:
            alike = torch.rand(2, 5), torch.randn(2, 5, 5), torch.randn(2, 3, 4, 4), torch.randn(2, 7), torch.randn(())
            many, of_each = torch.randn(2 * len(numbers), 3, 2, 2), len(numbers)
            like, own_rows = (
                torch.rand_like(many.double()),
                [torch.randn(of_each, *rest) for rest in ((3, 2), (3,), ())],
            )
            given = torch.randn(2, generator=torch.Generator().manual_seed(1))
        assert own.free and own.shapes == [x.shape for x in (*alike, many, like, *own_rows, given)]
        assert torch.equal(given, torch.randn(2, generator=torch.Generator().manual_seed(1)))
        return [many, like, *own_rows, *alike]

    two, one = drawn([4, 9]), drawn([9])
    assert all(torch.equal(mine[1::2], alone) for mine, alone in zip(two[:5], one[:5], strict=True))
    assert two[1].dtype == torch.float64 and two[1].min() >= 0 and not torch.equal(two[0][:2], two[0][2:])
    assert all(torch.equal(mine, alone) for mine, alone in zip(two[5:], one[5:], strict=True))


def test_what_is_drawn_by_generators_and_without_is_independent() -> None:
    numbers = list(range(4))
    samples = [(0, number) for number in numbers]
    with OwnDraws(samples):
        free = torch.randn(4, 3, 50, 50)
    drawn = [free, torch.stack([torch.randn(3, 50, 50, generator=each) for each in generators(samples)])]
    drawn += [initial_noise(0, numbers, (3, 50, 50), stream=stream) for stream in (LABEL_STREAM, 0, 1)]
    found = torch.corrcoef(torch.stack([rows.flatten() for rows in drawn]))
    assert (found - torch.eye(5)).abs().max() < 5 / 30000**0.5


def test_a_state_is_decoded_with_its_own_picture(tiny: Any, pictures: Path) -> None:
    from diffusers import AutoencoderKL

    class Told(AutoencoderKL):
        """What it decodes is as bright as what it has encoded."""

        def encode(self, x: Tensor, **options: Any) -> Any:
            self.told = x.mean((1, 2, 3), keepdim=True)
            return super().encode(x, **options)

        def decode(self, z: Tensor, **options: Any) -> Any:
            return (super().decode(z, return_dict=False)[0] + self.told,)

    vae = tiny.vae()
    vae.__class__ = Told
    pipe = tiny.stable_diffusion("StableDiffusionInstructPix2PixPipeline", vae=vae, unet=tiny.text_unet(in_channels=8))
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


def test_noise_is_given_in_the_form_that_the_pipeline_takes() -> None:
    pipe = import_module("diffusers_zoo.building").pipeline("Flux2Pipeline")
    denoiser = PipelineDenoiser(pipe, {"height": 32, "width": 32, "max_sequence_length": 8})
    assert denoiser.shape == (64, 16) and denoiser._form is not None and denoiser._form.shape == (16, 8, 8)
    x = initial_noise(0, range(3), denoiser.shape)
    assert torch.equal(pipe._pack_latents(denoiser._form(x)), x)
    met = ends(denoiser, [0, 1], [0, 0])
    assert torch.allclose(ends(denoiser, [1], [0]), met[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("permuted", "found"), [(True, True), (False, False)])
def test_a_form_is_a_permutation_even_in_half_precision(permuted: bool, found: bool) -> None:
    shape = (3, 20, 300)
    order = torch.randperm(18000, generator=torch.Generator().manual_seed(0))

    def begun(noise: Tensor) -> Tensor:
        state = noise.bfloat16().flatten(1)[:, order]
        return state if permuted else 0.5 * state

    form = form_of(shape, begun)
    assert (form is not None) is found
    if form is not None:
        x = torch.randn(2, 18000, generator=torch.Generator().manual_seed(1)).bfloat16()
        assert torch.equal(form(x).flatten(1)[:, order], x) and form(x).shape == (2, *shape)


@pytest.fixture(scope="module")
def single(tiny: Any) -> PipelineDenoiser:
    """A pipeline that takes one prompt a call."""
    from diffusers import StableDiffusionPipeline

    class Single(StableDiffusionPipeline):
        def check_inputs(self, prompt: Any, *args: Any, **options: Any) -> None:
            if not isinstance(prompt, str):
                raise ValueError("one prompt, please")
            super().check_inputs(prompt, *args, **options)

    pipe = tiny.pipeline("sd")
    return PipelineDenoiser(Single(**pipe.components, requires_safety_checker=False), {"guidance_scale": 3.0})


def test_what_takes_one_sample_a_call_is_solved_one_by_one(single: PipelineDenoiser, tiny: Any) -> None:
    several = PipelineDenoiser(tiny.pipeline("sd"), {"guidance_scale": 3.0})
    assert single.alone and not several.alone
    several.network.load_state_dict(single.network.state_dict())
    x, noise_schedule = initial_noise(0, range(3), single.shape), single.noise_schedule
    condition = single.encode(PROMPTS)
    rows = fixed.make("karras", noise_schedule, STEPS) * torch.tensor(
        [[1.0, 1.0, 1.0], [1.0, 0.9, 1.0], [1.0, 0.8, 1.0]]
    )
    for name, times in (("ddim", rows), ("ddim", rows[0]), ("ddpm", rows), ("heun", rows)):
        solver, found = build_solver(name, noise_schedule), []
        for denoiser in (single, several):
            z = times.clone().requires_grad_()
            noise = noise_for(0, range(3), x) if solver.needs_noise else None
            solution = integrate(
                denoiser, solver, z, x, condition=condition, step_noise=noise, keep_trajectory=True
            )  # fmt: skip
            found.append((*vars(solution).values(), *torch.autograd.grad(solution.x.square().mean(), z)))
        for mine, theirs in zip(*found, strict=True):
            assert mine.shape == theirs.shape and torch.allclose(mine.float(), theirs.float(), rtol=1e-3, atol=1e-3)
    t = torch.tensor([100.0, 300.0, 900.0]).double()
    for given in ({"t": t}, {"t": t[0], "model_time": t + 2, "output_scale": t / 500}):
        assert torch.allclose(single(x, **given, **condition), several(x, **given, **condition), rtol=1e-3, atol=1e-4)
    assert torch.allclose(single.decode(x, condition), several.decode(x, condition), atol=1e-5)
    for mine, theirs in zip(
        single.shown(x, condition)[1].values(), several.shown(x, condition)[1].values(), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-5)
