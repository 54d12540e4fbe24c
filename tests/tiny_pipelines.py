"""Tiny pipelines of real components with random weights, and predictors whose grids differ from image to image.

The fixture `tiny` is this module; it is imported when the first test asks for it, as diffusers takes its time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from noise_schedules import SD
from tiny_networks import WIDTH, XL, ready, small
from ts_adapt.grids import fixed
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.schedulers.scheduler import LearnedScheduler

STEPS = 4


def unet(channels: int = 1, size: int = 8) -> Any:
    return small("UNet2DModel", in_channels=channels, out_channels=channels, sample_size=size)


def text_unet(**options: Any) -> Any:
    return small("UNet2DConditionModel", **options)


def vae(**options: Any) -> Any:
    return small("AutoencoderKL", **options)


def betas(**options: Any) -> Any:
    return diffusers.DDIMScheduler(**SD, clip_sample=False, steps_offset=1, **options)


def flow(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **options)


def clip(layers: int = 1, projection: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=100, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, projection_dim=WIDTH,
    )  # fmt: skip
    return ready(getattr(transformers, "CLIPTextModelWithProjection" if projection else "CLIPTextModel")(config))


def tokenizer() -> Any:
    """Words are spelled, letter by letter."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return transformers.CLIPTokenizer({word: number for number, word in enumerate(words)}, [], model_max_length=8)


def ddpm() -> Any:
    return diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(prediction_type="sample"))


def ddim() -> Any:
    return diffusers.DDIMPipeline(unet(), betas(prediction_type="v_prediction"))


def ldm() -> Any:
    return diffusers.LDMPipeline(small("VQModel"), unet(3), betas())


def dit(learned_variance: bool = True) -> Any:
    transformer = small("DiTTransformer2DModel", out_channels=8 if learned_variance else 4)
    return diffusers.DiTPipeline(transformer, vae(), betas())


def stable_diffusion(kind: str = "StableDiffusionPipeline", **parts: Any) -> Any:
    """Of the class `kind`, with `parts` that a test wants otherwise."""
    own = {
        "vae": vae(), "text_encoder": clip(), "tokenizer": tokenizer(), "unet": text_unet(), "scheduler": betas(),
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip
    return getattr(diffusers, kind)(**own | parts)


def stable_diffusion_xl(**parts: Any) -> Any:
    own = {
        "vae": vae(), "text_encoder": clip(), "text_encoder_2": clip(projection=True), "tokenizer": None,
        "tokenizer_2": None, "unet": text_unet(**XL), "scheduler": betas(), "add_watermarker": False,
    }  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(**own | parts)


def stable_diffusion_3(**parts: Any) -> Any:
    texts = dict.fromkeys(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
    own = {"transformer": small("SD3Transformer2DModel"), "scheduler": flow(), "vae": vae(shift_factor=0.1)}
    return diffusers.StableDiffusion3Pipeline(**texts | own | parts)


def flux(**parts: Any) -> Any:
    own = {
        "transformer": small("FluxTransformer2DModel"), "scheduler": flow(use_dynamic_shifting=True),
        "vae": vae(shift_factor=0.1), "text_encoder": None, "tokenizer": None, "text_encoder_2": None,
        "tokenizer_2": None,
    }  # fmt: skip
    return diffusers.FluxPipeline(**own | parts)


PIPELINES: dict[str, Callable[[], Any]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "ldm": ldm,
    "dit": dit,
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "sd-img2img": lambda: stable_diffusion("StableDiffusionImg2ImgPipeline"),
}


def pipeline(name: str) -> Any:
    torch.manual_seed(0)
    pipe = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def predictor(kind: type, noise_schedule: Any, shape: tuple[int, ...], *steps: int, **options: Any) -> Any:
    """A predictor that has not been trained but does differ from sample to sample."""
    torch.manual_seed(1)
    grids = [fixed.make("karras", noise_schedule, n) for n in steps or (STEPS,)]
    built = kind(noise_schedule, grids, shape, width=8, hidden=16, **options)
    with torch.no_grad():
        built.encoder.weight.normal_(0, 0.2)
        for change in (built.start, built.residual):
            if change is not None:
                change.weight.normal_(0, 0.3)
    return ready(built)


def static_times(noise_schedule: Any, steps: int = STEPS) -> Tensor:
    """A grid that is none of the fixed ones, with times that are no integers."""
    times = fixed.make("karras", noise_schedule, steps)
    return torch.cat([times[:1], times[1:-1] * 0.9, times[-1:]])


def schedule(kind: str, config: Any, shape: tuple[int, ...], solver: str = "unipc-3", **options: Any) -> Any:
    """A schedule of `kind` for pipelines with the scheduler config `config`."""
    from ts_adapt.denoisers.scheduler_config import noise_of

    noise_schedule, _ = noise_of(config)
    if kind == "static":
        return LearnedScheduler.from_grid(static_times(noise_schedule), solver, config, **options)
    class_ = {"one-shot": OneShot, "recursive": Recursive}[kind]
    return LearnedScheduler.from_predictors(predictor(class_, noise_schedule, shape, **options), solver, config)
