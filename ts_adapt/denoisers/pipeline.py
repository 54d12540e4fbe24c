"""A diffusers pipeline as a denoiser: its network, and the noise schedule, prediction and decoder of its config.

    betas, prediction type    pipe.scheduler.config         x_t = alpha_t x_0 + sigma_t eps, t the real-valued timestep
    images                    z -> vae.decode(z / scaling_factor + shift_factor)            for latent models

The scheduler lends its config and nothing else: grids and solvers are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.denoisers.network import NetworkDenoiser
from ts_adapt.denoisers.scheduler_config import noise_of, scheduler_config
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Condition
from ts_adapt.parameterization import PREDICTION_TYPES
from ts_adapt.prompts import token_count, trimmed

PIPELINES: dict[str, tuple[str, str | None]] = {
    "DDPMPipeline": ("unet", None),
    "DDIMPipeline": ("unet", None),
    "LDMPipeline": ("unet", "vqvae"),
    "DiTPipeline": ("transformer", "vae"),
    "StableDiffusionPipeline": ("unet", "vae"),
}
"""Pipeline class -> the names of its network and of its decoder."""


def from_pipeline(pipe: Any, prediction: str | None = None, *, clip_x0: bool = False) -> NetworkDenoiser:
    """The denoiser inside a diffusers pipeline.

    pipe        one of `PIPELINES`, or of a class derived from one; its network and decoder are put in evaluation mode
                and frozen, in place, so that gradients reach the times only
    prediction  epsilon, sample, v or velocity; None: what the scheduler's config says
    clip_x0     clamp x0 to [-1, 1]; off by default, whatever the scheduler's `clip_sample` says

    A DiT knows its null class, Stable Diffusion the embedding of the empty prompt (`null_condition`); its prompts are
    turned into conditions by `encode`. Raises TsAdaptError for other pipelines, and for schedulers without a noise
    schedule of ours.
    """
    family = _family(pipe)
    if family is None:
        raise TsAdaptError(
            f"{type(pipe).__name__} is not supported; supported are {', '.join(PIPELINES)}: "
            "take PipelineDenoiser(pipe), or build NetworkDenoiser(network, noise_schedule, prediction) by hand"
        )
    network_name, decoder_name = PIPELINES[family]
    network = getattr(pipe, network_name)
    decoder = None if decoder_name is None else LatentDecoder(getattr(pipe, decoder_name))
    config = scheduler_config(pipe.scheduler)
    noise_schedule, predicted = noise_of(config, prediction=prediction)
    if prediction in PREDICTION_TYPES.values():
        config["prediction_type"] = next(k for k, v in PREDICTION_TYPES.items() if v == prediction)
    null: Condition | None = None
    if family == "DiTPipeline":
        null = {"class_labels": network.config.num_embeds_ada_norm}
    encode = None
    if getattr(pipe, "encode_prompt", None) is not None:
        null = encode_prompts(pipe, [""])[0]

        def encode(prompts: Sequence[str]) -> Condition:
            return encode_prompts(pipe, prompts)[0]

    denoiser = NetworkDenoiser(
        network, noise_schedule, predicted, clip_x0=clip_x0, decoder=decoder, null_condition=null,
        encode=encode, scheduler_config=config,
    )  # fmt: skip
    for module in (network, decoder):
        if module is not None:
            module.eval().requires_grad_(False)
    return denoiser


def is_direct(pipe: Any) -> bool:
    """Whether `from_pipeline` takes `pipe`."""
    return _family(pipe) is not None


def _family(pipe: Any) -> str | None:
    return next((kind.__name__ for kind in type(pipe).__mro__ if kind.__name__ in PIPELINES), None)


class LatentDecoder(nn.Module):
    """Images in [-1, 1] from latents: an autoencoder of diffusers, with the scaling of its config undone."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        config: Any = autoencoder.config
        self.scaling = float(getattr(config, "scaling_factor", None) or 1.0)
        self.shift = float(getattr(config, "shift_factor", None) or 0.0)

    def forward(self, z: Tensor) -> Tensor:
        """`(B, c, h, w)` -> `(B, C, H, W)`, in the dtype of `z`."""
        dtype = next(self.autoencoder.parameters()).dtype
        decode: Any = self.autoencoder.decode
        image: Tensor = decode((z / self.scaling + self.shift).to(dtype)).sample
        return image.to(z.dtype)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)` in [-1, 1] -> `(B, c, h, w)`, the mode of their distribution where there is one."""
        weight = next(self.autoencoder.parameters())
        encode: Any = self.autoencoder.encode
        found = encode(images.to(weight))
        z: Tensor = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
        return ((z - self.shift) * self.scaling).to(images.dtype)


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: Sequence[str], negative: str = "") -> tuple[Condition, Condition]:
    """The condition `(B, tokens, width)` of `prompts`, and that of the `negative` prompt for `Guided`.

    Prompts that are longer than the pipeline's tokenizer allows (77 tokens of CLIP) are cut at a word. Raises
    TsAdaptError for a pipeline without text encoder.
    """
    if getattr(pipe, "encode_prompt", None) is None:
        raise TsAdaptError(f"{type(pipe).__name__} encodes no prompts; give its condition (class_labels) as tensors")
    tokenizer, prompts = getattr(pipe, "tokenizer", None), list(prompts)
    if tokenizer is not None:
        prompts = trimmed(prompts, token_count(tokenizer), tokenizer.model_max_length)
    embeddings, unconditional = pipe.encode_prompt(
        prompts, pipe.device, 1, do_classifier_free_guidance=True, negative_prompt=[negative] * len(prompts)
    )[:2]
    return {"encoder_hidden_states": embeddings}, {"encoder_hidden_states": unconditional[:1]}
