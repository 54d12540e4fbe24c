"""How well images show what their prompts say: the CLIP score (Hessel et al. 2021, arXiv:2104.08718).

    score = cos(image features, text features)      as benchmarks of samplers report it, about 0.3 for good images

CLIP is one of transformers' making, read from a folder or the hub; nothing is imported before it is asked for. Prompts
are cut at a word to what its text encoder takes (77 tokens), as they are where images are made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ts_adapt.interfaces import TsAdaptError, one_line
from ts_adapt.prompts import token_count, trimmed
from ts_adapt.zoo.data import to_uint8

ClipScore = Callable[[Tensor, Sequence[str]], Tensor]
"""(images `(B, C, H, W)` in [-1, 1] with C 1 or 3, B prompts) -> `(B,)`."""


def clip_scorer(weights: str, device: torch.device | str = "cpu") -> ClipScore:
    """The CLIP score by the model `weights`: a folder, or a hub id such as openai/clip-vit-base-patch16.

    Raises TsAdaptError where transformers is not installed, and where the weights are not to be had as safetensors.
    """
    try:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
    except ImportError as error:
        raise TsAdaptError(
            f"the CLIP score needs transformers ({error}); pip install 'ts_adapt[text]', or leave evaluate.clip out"
        ) from error
    try:
        model: Any = CLIPModel.from_pretrained(weights, use_safetensors=True).eval()
        model.to(device)
        tokenizer, processor = CLIPTokenizer.from_pretrained(weights), CLIPImageProcessor.from_pretrained(weights)
    except (OSError, ValueError) as error:
        raise TsAdaptError(
            f"the CLIP weights {weights!r} cannot be had ({one_line(error)}); give a folder of a CLIPModel, "
            "with its weights as safetensors, or leave evaluate.clip out"
        ) from error
    longest = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        if len(images) != len(prompts):
            raise TsAdaptError(f"there are {len(images)} images and {len(prompts)} prompts; give a prompt for each")
        pixels = to_uint8(images).expand(-1, 3, -1, -1).cpu()
        seen = processor(images=list(pixels), return_tensors="pt", input_data_format="channels_first")
        short = trimmed(prompts, token_count(tokenizer), longest)
        words = tokenizer(short, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        out = model(**seen.to(device), **words.to(device))
        return F.cosine_similarity(out.image_embeds, out.text_embeds).float().cpu()

    return score
