"""What learning through a pipeline's own loop costs beside the direct way: seconds of a gradient step, paired.

    python benchmarks/pipeline_overhead.py [--width 32] [--steps 5] [--batch 2] [--rounds 20] [--device cpu]

A gradient step is a solve and its gradient in the logits of a grid for each sample, guided; both ways take turns, and
the ratio is the median of those of the turns. Stable Diffusion and DiT are of random weights; `--width` is that of the
first block of the one (Stable Diffusion 1.5 has 320), and a quarter of that of the other (DiT-XL/2 has 1152). The
smaller it is the more the loop weighs, which takes some 5 ms a solve: prompts, latents, checks of its arguments. The
last line is JSON: `sd` and `dit`, seconds through the pipeline / seconds of the direct way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import ts_adapt  # noqa: F401  # isort: skip
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ts_adapt import Guided, PipelineDenoiser, build_solver, from_pipeline, initial_noise, integrate
from ts_adapt.grids import fixed
from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import TimeGrid

SCALE, TOKENS, TEXT = 3.0, 77, 64
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def stable_diffusion(width: int) -> Any:
    blocks = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    network = UNet2DConditionModel(
        sample_size=32, block_out_channels=(width, 2 * width, 4 * width), down_block_types=blocks,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=TEXT,
        attention_head_dim=8,
    )  # fmt: skip
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer({word: place for place, word in enumerate(words)}, [], model_max_length=TOKENS)
    text = CLIPTextConfig(
        vocab_size=100, hidden_size=TEXT, intermediate_size=4 * TEXT, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=TOKENS, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=network,
        scheduler=DDIMScheduler(**BETAS), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def dit(width: int) -> Any:
    network = DiTTransformer2DModel(
        num_attention_heads=max(1, width // 4), attention_head_dim=16, in_channels=4, out_channels=8, num_layers=8,
        sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return DiTPipeline(network, autoencoder(), DDIMScheduler(**BETAS))


def autoencoder() -> Any:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def gradient_step(denoiser: Any, condition: dict[str, Tensor], x_T: Tensor, steps: int) -> Callable[[], Tensor]:
    space, solver = GridSpace(denoiser.noise_schedule, steps), build_solver("unipc-3", denoiser.noise_schedule)
    start = space.numbers(TimeGrid(fixed.make("karras", denoiser.noise_schedule, steps)))

    def step() -> Tensor:
        z = start.repeat(len(x_T), 1).requires_grad_()
        end = integrate(denoiser, solver, space.grid(z), x_T, condition=condition).x
        return torch.autograd.grad(end.square().mean(), z)[0]

    return step


def seconds(work: Callable[[], Tensor], device: str) -> float:
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    begun = clock()
    work().cpu()
    return clock() - begun


def ratio(name: str, options: argparse.Namespace) -> float:
    torch.manual_seed(0)
    pipe = {"sd": stable_diffusion, "dit": dit}[name](options.width).to(options.device)
    direct: Any = from_pipeline(pipe)
    through: Any = PipelineDenoiser(pipe, {"guidance_scale": SCALE})
    x_T = initial_noise(0, range(options.batch), direct.shape).to(options.device)
    if name == "sd":
        prompts = ["a cat", "a dog"] * options.batch
        conditions = [denoiser.encode(prompts[: options.batch]) for denoiser in (direct, through)]
    else:
        conditions = [{"class_labels": torch.arange(options.batch, device=options.device)}] * 2
    ways = [
        gradient_step(denoiser, condition, x_T, options.steps)
        for denoiser, condition in zip((Guided(direct, SCALE), through), conditions, strict=True)
    ]
    taken = [[seconds(way, options.device) for way in ways] for _ in range(options.rounds + 1)][1:]
    found = statistics.median(second / first for first, second in taken)
    print(f"{name}: {statistics.median(first for first, _ in taken):.4f} s directly, {found:.4f} times as many through")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(json.dumps({name: round(ratio(name, options), 4) for name in ("sd", "dit")}))


if __name__ == "__main__":
    main()
