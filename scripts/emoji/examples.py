"""What the text-to-image models are trained on: latents and prompts, prepared once.

z = mean + deviation eps        a draw from the autoencoder's posterior, another each time
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from emoji import autoencoder, text
from emoji.data import Data


@dataclass(frozen=True)
class Examples:
    """mean and deviation of the latents `(n, 4, 16, 16)`, the tokens of the prompts `(n, 16)` and of none `(1, 16)`"""

    mean: Tensor
    deviation: Tensor
    prompts: Tensor
    empty: Tensor

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents and prompts of so many pictures at random; in some cases the empty prompt."""
        rows = torch.randint(len(self.mean), (count,), generator=generator)
        eps = torch.randn(count, *self.mean.shape[1:], generator=generator)
        z = self.mean[rows] + self.deviation[rows] * eps
        return z, text.with_dropped(self.prompts[rows], self.empty, generator)


def examples(data: Data, vae: Path, tokenizer: CLIPTokenizer) -> Examples:
    """Those of all pictures of `data`, under the autoencoder in the folder `vae`."""
    mean, variance = autoencoder.posterior(autoencoder.load(vae), data.pictures)
    prompts = text.tokens(tokenizer, [*data.captions, ""])
    return Examples(mean, variance.sqrt(), prompts[:-1], prompts[-1:])
