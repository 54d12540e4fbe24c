"""emoji-sd: a StableDiffusionPipeline, trained the ordinary way.

    z_t = alpha_t z + sigma_t eps        loss = |v - (alpha_t eps - sigma_t z)|^2

Integer timesteps uniform on 0..999 of the scaled-linear betas of Stable Diffusion, the time embedding as it comes, and
a text encoder trained along. Attention, to the prompt too, is where there are 8x8 places and fewer.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from emoji import autoencoder, text
from emoji.data import Data
from emoji.examples import examples
from noising import noised, training_times, validation_times
from training import Plan, train
from ts_adapt.noise import BetaTable

CHANNELS, HEADS = (48, 80, 112), 4
WIDTH, LAYERS = 128, 2
"""Of the text encoder."""


class Networks(nn.Module):
    """UNet and text encoder: latents `(B, 4, 16, 16)`, timesteps `(B,)`, tokens `(B, 16)` -> v `(B, 4, 16, 16)`"""

    def __init__(self, tokenizer: CLIPTokenizer, channels: tuple[int, ...] = CHANNELS, width: int = WIDTH) -> None:
        super().__init__()
        attentive = len(channels) - 1
        self.unet = UNet2DConditionModel(
            sample_size=autoencoder.SIDE,
            in_channels=autoencoder.LATENTS,
            out_channels=autoencoder.LATENTS,
            layers_per_block=1,
            block_out_channels=channels,
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * attentive),
            up_block_types=(*("CrossAttnUpBlock2D",) * attentive, "UpBlock2D"),
            norm_num_groups=16,
            attention_head_dim=HEADS,
            cross_attention_dim=width,
            use_linear_projection=True,
        )
        self.text_encoder = CLIPTextModel(text.config(tokenizer, width, LAYERS))

    def forward(self, z_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        prompts = self.text_encoder(tokens).last_hidden_state
        found: Tensor = self.unet(z_t, t, encoder_hidden_states=prompts).sample
        return found


def scheduler() -> DDIMScheduler:
    """The scheduler in the folder: Stable Diffusion's betas, v-prediction."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_sd(data: Data, vae: Path, plan: Plan, channels: tuple[int, ...] = CHANNELS) -> Networks:
    """Train it, or on, with the autoencoder in the folder `vae`; the pipeline is written to `plan.out` / pipeline."""
    torch.manual_seed(plan.seed)
    about = {"what": "sd", "channels": list(channels), "autoencoder": autoencoder.weights_of(vae)}
    tokenizer = text.tokenizer_of(data.part(False).captions)
    seen, held_out = (examples(data.part(part), vae, tokenizer) for part in (False, True))
    noise = BetaTable.from_config(scheduler().config)

    def loss(net: Networks, count: int, generator: torch.Generator) -> Tensor:
        z, prompts = seen.draw(count, generator)
        t = training_times(count, smooth=False, generator=generator)
        z_t, target = noised(z, t, noise, generator)
        return F.mse_loss(net(z_t, t, prompts), target)

    @torch.no_grad()
    def measure(net: Networks) -> float:
        generator = torch.Generator().manual_seed(7)
        t = validation_times(len(held_out.mean), generator).round()
        z_t, target = noised(held_out.mean, t, noise, generator)
        return F.mse_loss(net(z_t, t, held_out.prompts), target).item()

    def write(net: Networks) -> None:
        write_pipeline(net, tokenizer, vae, plan.out / "pipeline")

    return train(Networks(tokenizer, channels), plan, about, loss, measure, write)


def write_pipeline(net: Networks, tokenizer: CLIPTokenizer, vae: Path, folder: Path) -> None:
    """Write the StableDiffusionPipeline of these networks, in float16."""
    halved = copy.deepcopy(net).half().eval()
    StableDiffusionPipeline(
        vae=autoencoder.load(vae).half(),
        text_encoder=halved.text_encoder,
        tokenizer=tokenizer,
        unet=halved.unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    text.finish(folder, tokenizer)
