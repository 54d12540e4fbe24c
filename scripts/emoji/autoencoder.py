"""The autoencoder that both models share: AutoencoderKL, 64x64x3 -> 16x16x4, made for drawings.

    loss = |x - y| + EDGES (|Dx - Dy|, at full and at half resolution) + KL (divergence of the latents from N(0, 1))

D are differences to the right and downwards: what the eye sees of a drawing is its edges. Most of the time goes where
the resolution is full, so that level is thin. Pictures are mirrored, and their colours interchanged, in half the cases.

Latents are standardised channel by channel by the network itself: with mean m and deviation s of the training latents,

    quant_conv        mean -> (mean - m) / s,  log variance -> log variance - 2 log s
    post_quant_conv   W z + b -> W (s z + m) + b

both of 1x1 and thus exact up to the borders. So scaling_factor is 1 and shift_factor 0.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from emoji.data import SIZE, Data
from training import Plan, train
from ts_adapt.storage.files import sha256_of_file
from ts_adapt.zoo.data import to_model_range

CHANNELS, LATENTS = (16, 32, 64), 4
EDGES, KL = 0.5, 1e-3
SIDE = SIZE // 2 ** (len(CHANNELS) - 1)
"""Of the latents, in pixels."""


def network(channels: tuple[int, ...] = CHANNELS) -> AutoencoderKL:
    """The autoencoder, untrained."""
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
        mid_block_add_attention=False,
    )


def train_autoencoder(data: Data, plan: Plan, channels: tuple[int, ...] = CHANNELS) -> AutoencoderKL:
    """Train it, or on; it is written to `plan.out` / vae, standardised and in float16."""
    torch.manual_seed(plan.seed)
    seen, held_out = data.part(False).pictures, to_model_range(data.part(True).pictures)

    def loss(net: AutoencoderKL, count: int, generator: torch.Generator) -> Tensor:
        x = varied(to_model_range(seen[torch.randint(len(seen), (count,), generator=generator)]), generator)
        posterior = net.encode(x).latent_dist
        y = net.decode(posterior.sample(generator)).sample
        return difference(x, y) + KL * posterior.kl().mean() / (LATENTS * SIDE**2)

    @torch.no_grad()
    def measure(net: AutoencoderKL) -> float:
        errors = [F.l1_loss(net.decode(net.encode(x).latent_dist.mode()).sample, x) for x in held_out.split(64)]
        return torch.stack(errors).mean().item()

    def write(net: AutoencoderKL) -> None:
        made = network(channels).eval()
        made.load_state_dict(net.state_dict())
        standardise(made, seen[::8])
        made.half().save_pretrained(plan.out / "vae")

    about = {"what": "autoencoder", "channels": list(channels)}
    return train(network(channels), plan, about, loss, measure, write)


def difference(x: Tensor, y: Tensor) -> Tensor:
    """How far pictures `y` are from `x`, in colours and in edges; the mean over all."""
    edges = sum(
        F.l1_loss(of_x.diff(dim=side), of_y.diff(dim=side))
        for of_x, of_y in ((x, y), (F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)))
        for side in (2, 3)
    )
    return F.l1_loss(x, y) + EDGES * edges


def varied(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures `(n, 3, h, w)`, half of them mirrored and half of them with their colours in another order."""
    mirrored, recoloured = torch.rand(2, len(x), 1, 1, 1, generator=generator) < 0.5
    x = torch.where(mirrored, x.flip(3), x)
    return torch.where(recoloured, x[:, torch.randperm(3, generator=generator)], x)


@torch.no_grad()
def standardise(net: AutoencoderKL, pictures: Tensor) -> None:
    """Have the latents of `pictures` `(n, 3, 64, 64)` uint8 mean 0 and deviation 1 in every channel."""
    means, variances = posterior(net, pictures)
    m = means.mean((0, 2, 3))
    s = (means.var((0, 2, 3), correction=0) + variances.mean((0, 2, 3))).sqrt()
    into, back = net.quant_conv, net.post_quant_conv
    back.bias += back.weight[:, :, 0, 0] @ m
    back.weight *= s[:, None, None]
    into.bias -= torch.cat([m, 2 * s.log()])
    into.weight[:LATENTS] /= s[:, None, None, None]
    into.bias[:LATENTS] /= s


@torch.no_grad()
def posterior(net: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the latents, `(n, 4, 16, 16)` each, of `pictures` `(n, 3, 64, 64)` uint8."""
    found = [net.encode(to_model_range(part)).latent_dist for part in pictures.split(64)]
    return torch.cat([of.mean for of in found]), torch.cat([of.var for of in found])


def weights_of(vae: Path) -> str:
    """The sha256 of the weights in the folder: a model trained on the latents of one autoencoder is of that one only.

    Raises TsAdaptError where there are none.
    """
    return sha256_of_file(vae / "diffusion_pytorch_model.safetensors")


def load(vae: Path) -> AutoencoderKL:
    """The autoencoder in the folder, in float32."""
    return AutoencoderKL.from_pretrained(vae).eval().requires_grad_(False)
