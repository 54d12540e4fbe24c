"""Tiny pipelines of real components with random weights, and predictors whose grids differ from image to image.

The fixture `tiny` is this module; it is imported when the first test asks for it, as diffusers takes its time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ts_adapt.grids import fixed
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.schedulers.scheduler import LearnedScheduler

STEPS = 4
WIDTH = 16


def _ready(module: Any) -> Any:
    return module.eval().requires_grad_(False)


def unet(channels: int = 1, size: int = 8) -> Any:
    from diffusers import UNet2DModel

    return _ready(
        UNet2DModel(
            sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=1,
            block_out_channels=(8, 16), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
            norm_num_groups=4, attention_head_dim=8,
        )
    )  # fmt: skip


def text_unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return _ready(
        UNet2DConditionModel(
            sample_size=8, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4, attention_head_dim=2, **{"in_channels": 4, "cross_attention_dim": WIDTH, **options},
        )
    )  # fmt: skip


def vae(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    return _ready(
        AutoencoderKL(
            in_channels=3, out_channels=3, block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
            scaling_factor=0.3, **options,
        )
    )  # fmt: skip


def betas(**options: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1, **options
    )  # fmt: skip


def flow(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0, **options)


def clip(**options: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=100, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=options.get("layers", 1),
        num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, projection_dim=WIDTH,
    )  # fmt: skip
    return _ready((CLIPTextModelWithProjection if options.get("projection") else CLIPTextModel)(config))


def tokenizer() -> Any:
    """Words are spelled, letter by letter."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer({word: number for number, word in enumerate(words)}, [], model_max_length=8)


def ddpm() -> Any:
    from diffusers import DDPMPipeline, DDPMScheduler

    return DDPMPipeline(unet(), DDPMScheduler(prediction_type="sample"))


def ddim() -> Any:
    from diffusers import DDIMPipeline

    return DDIMPipeline(unet(), betas(prediction_type="v_prediction"))


def ldm() -> Any:
    from diffusers import LDMPipeline, VQModel

    vqvae = VQModel(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3, norm_num_groups=4, scaling_factor=0.4,
    )  # fmt: skip
    return LDMPipeline(_ready(vqvae), unet(3), betas())


def dit(learned_variance: bool = True) -> Any:
    from diffusers import DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8 if learned_variance else 4,
        num_layers=1, sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=2,
    )  # fmt: skip
    return DiTPipeline(_ready(transformer), vae(), betas())


def stable_diffusion(image: bool = False) -> Any:
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

    kind = StableDiffusionImg2ImgPipeline if image else StableDiffusionPipeline
    return kind(
        vae=vae(), text_encoder=clip(), tokenizer=tokenizer(), unet=text_unet(), scheduler=betas(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl() -> Any:
    from diffusers import StableDiffusionXLPipeline

    network = text_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=24 + WIDTH,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip(), text_encoder_2=clip(projection=True), tokenizer=None, tokenizer_2=None,
        unet=network, scheduler=betas(), add_watermarker=False,
    )  # fmt: skip


def stable_diffusion_3() -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        caption_projection_dim=8, joint_attention_dim=WIDTH, pooled_projection_dim=6, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=_ready(transformer), scheduler=flow(), vae=vae(shift_factor=0.1), text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def flux() -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=6, axes_dims_rope=(2, 2, 4), guidance_embeds=False,
    )  # fmt: skip
    return FluxPipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=vae(shift_factor=0.1), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=_ready(transformer),
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], Any]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "ldm": ldm,
    "dit": dit,
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "sd-img2img": lambda: stable_diffusion(image=True),
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
    return _ready(built)


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
