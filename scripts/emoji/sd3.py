"""emoji-sd3: a StableDiffusion3Pipeline on the same autoencoder, trained by rectified flow.

    z_t = (1 - t) z + t eps      loss = |u - (eps - z)|^2      t = k / 1000, k = ceil(1000 / (1 + e^-n)), n ~ N(0, 1)

Two small text encoders stand where CLIP-L and CLIP-G do, side by side in width; there is no T5. Without one, the
pipeline gives the transformer `max_sequence_length` tokens that are zero, 256 by default, 15 times as many as the
prompt has. They have no places and are thus alike in every layer, so one of them stands for m in training if its weight
in every softmax is m times that of a token, that is if log m is added to its score (`Repeated`). m is drawn anew for
each picture, log-uniform on 1..256: the model may be called with any max_sequence_length.

The transformer learns in bfloat16 but for its attention, whose derivative is much slower so on a CPU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from emoji import autoencoder, text
from emoji.data import Data
from emoji.examples import examples
from training import Plan, train

HEADS, HEAD, LAYERS, PATCH = 4, 32, 8, 2
WIDTH, TEXT_LAYERS = 96, 2
"""Of each text encoder."""
ZEROS = 256
"""The most tokens of a T5 that is not there."""


class Repeated(TorchFunctionMode):
    """While it is entered, attention counts the last key `times` `(B,)` times, and is done in float32."""

    def __init__(self, times: Tensor) -> None:
        super().__init__()
        self.times = times

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, key, value = (part.float() for part in args)
        bias = key.new_zeros(len(key), 1, 1, key.shape[2])
        bias[..., -1] = self.times.log()[:, None, None]
        with torch.autocast("cpu", enabled=False):
            return function(query, key, value, **kwargs | {"attn_mask": bias})


class Networks(nn.Module):
    """Transformer and text encoders: latents `(B, 4, 16, 16)`, timesteps `(B,)` of 1..1000, tokens `(B, 16)` and how
    many zeros follow them `(B,)` -> velocity `(B, 4, 16, 16)`"""

    def __init__(self, tokenizer: CLIPTokenizer, layers: int = LAYERS, width: int = WIDTH) -> None:
        super().__init__()
        self.transformer = SD3Transformer2DModel(
            sample_size=autoencoder.SIDE,
            patch_size=PATCH,
            in_channels=autoencoder.LATENTS,
            out_channels=autoencoder.LATENTS,
            num_layers=layers,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD,
            caption_projection_dim=HEADS * HEAD,
            joint_attention_dim=2 * width,
            pooled_projection_dim=2 * width,
            pos_embed_max_size=autoencoder.SIDE // PATCH,
        )
        encoders = [CLIPTextModelWithProjection(text.config(tokenizer, width, TEXT_LAYERS)) for _ in range(2)]
        self.text_encoder, self.text_encoder_2 = encoders

    def forward(self, z_t: Tensor, t: Tensor, tokens: Tensor, zeros: Tensor) -> Tensor:
        of = [encoder(tokens, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        prompts = F.pad(torch.cat([found.hidden_states[-2] for found in of], dim=2), (0, 0, 0, 1))
        pooled = torch.cat([found.text_embeds for found in of], dim=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training), Repeated(zeros):
            velocity: Tensor = self.transformer(z_t, prompts, pooled, t).sample
        return velocity.float()


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler in the folder: times as they are, not shifted, for so few places."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def train_sd3(data: Data, vae: Path, plan: Plan, layers: int = LAYERS) -> Networks:
    """Train it, or on, with the autoencoder in the folder `vae`; the pipeline is written to `plan.out` / pipeline."""
    torch.manual_seed(plan.seed)
    about = {"what": "sd3", "layers": layers, "autoencoder": autoencoder.weights_of(vae)}
    tokenizer = text.tokenizer_of(data.part(False).captions)
    seen, held_out = (examples(data.part(part), vae, tokenizer) for part in (False, True))

    def loss(net: Networks, count: int, generator: torch.Generator) -> Tensor:
        z, prompts = seen.draw(count, generator)
        timesteps = (1000 * torch.randn(count, generator=generator).sigmoid()).ceil()
        zeros = (math.log(ZEROS) * torch.rand(count, generator=generator)).exp().round()
        z_t, target = on_the_way(z, timesteps, generator)
        return F.mse_loss(net(z_t, timesteps, prompts, zeros), target)

    @torch.no_grad()
    def measure(net: Networks) -> float:
        generator, count = torch.Generator().manual_seed(7), len(held_out.mean)
        quantiles = (torch.randperm(count, generator=generator) + 0.5) / count
        timesteps = (1000 * torch.special.ndtri(quantiles).sigmoid()).ceil()
        z_t, target = on_the_way(held_out.mean, timesteps, generator)
        return F.mse_loss(net(z_t, timesteps, held_out.prompts, torch.full((count,), float(ZEROS))), target).item()

    def write(net: Networks) -> None:
        write_pipeline(net, tokenizer, vae, plan.out / "pipeline")

    return train(Networks(tokenizer, layers), plan, about, loss, measure, write)


def on_the_way(z: Tensor, timesteps: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """z_t and the velocity there, at `timesteps` `(B,)` of 1..1000."""
    eps, t = torch.randn(z.shape, generator=generator), timesteps[:, None, None, None] / 1000
    return torch.lerp(z, eps, t), eps - z


def write_pipeline(net: Networks, tokenizer: CLIPTokenizer, vae: Path, folder: Path) -> None:
    """Write the StableDiffusion3Pipeline of these networks, in float16."""
    halved = copy.deepcopy(net).half().eval()
    StableDiffusion3Pipeline(
        vae=autoencoder.load(vae).half(),
        transformer=halved.transformer,
        scheduler=scheduler(),
        text_encoder=halved.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=halved.text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)
    text.finish(folder, tokenizer)
