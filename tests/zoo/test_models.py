"""The embedded diffusion models make clothes, clothes of the class asked for, and emoji of what a prompt says."""

from __future__ import annotations

import pytest
import torch

import ts_adapt
from ts_adapt import zoo
from ts_adapt.denoisers.load import load_pipeline
from ts_adapt.pipelines.load import load
from ts_adapt.zoo import load_features, load_matching, paths, reference_statistics
from ts_adapt.zoo.data import to_model_range


def solve(denoiser, count, **condition):
    solver = ts_adapt.build_solver("unipc-3", denoiser.noise_schedule)
    grid = ts_adapt.build_grid("ays-sd15", denoiser.noise_schedule, 12, rescale=True)
    x_T = ts_adapt.initial_noise(11, range(count), denoiser.shape)
    with torch.inference_mode():
        return ts_adapt.integrate(denoiser, solver, grid, x_T, condition=condition).x


@pytest.fixture(scope="module")
def class_means():
    images, labels = zoo.test_images()
    with torch.inference_mode():
        pooled = load_features()(to_model_range(images[:3000])).pooled
    return torch.stack([pooled[labels[:3000] == k].mean(0) for k in range(10)])


def nearest(images, class_means):
    with torch.inference_mode():
        return torch.cdist(load_features()(images.clamp(-1, 1)).pooled, class_means).argmin(1)


def test_weights_are_small_and_safetensors():
    for folder in paths().values():
        files = list(folder.rglob("*.safetensors"))
        assert sum(file.stat().st_size for file in files) < 15e6
        assert not list(folder.rglob("*.bin"))


def test_unconditional_samples_lie_near_the_data(class_means):
    with torch.inference_mode():
        pooled = load_features()(solve(load("fashion-ddpm"), 48).clamp(-1, 1)).pooled.double().mean(0)
        noise = load_features()(torch.rand(48, 1, 28, 28) * 2 - 1).pooled.double().mean(0)
    mean = torch.from_numpy(reference_statistics()[0])
    assert (pooled - mean).norm() < 0.2 * (noise - mean).norm()


def test_the_twin_makes_the_class_it_is_asked_for_and_guidance_insists(class_means):
    denoiser = load("fashion-ddpm-class")
    labels = torch.arange(40) % 10
    plain = (nearest(solve(denoiser, 40, class_labels=labels), class_means) == labels).float().mean()
    guided = solve(ts_adapt.Guided(denoiser, 2.5), 40, class_labels=labels)
    insisted = (nearest(guided, class_means) == labels).float().mean()
    assert plain > 0.5
    assert insisted >= plain


@pytest.mark.parametrize("model, options", [("emoji-sd", {}), ("emoji-sd3", {"max_sequence_length": 8})])
def test_the_text_models_make_what_they_are_told_to(model, options):
    prompts = [
        "noto woman astronaut with dark skin tone", "fluent red heart", "noto man running with medium light skin tone",
        "fluent thumbs up with light skin tone", "noto flag sweden", "fluent grinning face", "noto santa claus",
        "fluent person in lotus position with medium dark skin tone",
    ]  # fmt: skip
    pipe = load_pipeline(model)
    images = pipe(
        prompts, num_inference_steps=15, guidance_scale=4.0, output_type="pt",
        generator=torch.Generator().manual_seed(0), **options,
    ).images  # fmt: skip
    net = load_matching()
    with torch.inference_mode():
        found = net(2 * images - 1, net.numbers(prompts)).argmax(1)
    assert (found == torch.arange(len(prompts))).double().mean() >= 0.75


def test_networks_are_smooth_in_time():
    """The derivative in t is that of a step of a timestep and more, which a search of times relies on."""
    denoiser = load("fashion-ddpm")
    x = ts_adapt.initial_noise(0, range(8), denoiser.shape)

    def slope(t: float, step: float) -> torch.Tensor:
        ends = (torch.tensor(t + sign * step, dtype=torch.float64) for sign in (1, -1))
        with torch.no_grad():
            up, down = (denoiser(x, torch.tensor(t, dtype=torch.float64), model_time=at) for at in ends)
        return (up - down) / (2 * step)

    for t in (200.0, 600.0, 900.0):
        assert (slope(t, 0.1) - slope(t, 3.0)).norm() < 0.2 * slope(t, 3.0).norm()
