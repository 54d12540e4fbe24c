"""How well images show what their prompts say: the CLIP score (Hessel et al. 2021, arXiv:2104.08718).

    score = cos(image features, text features)      as benchmarks of samplers report it, about 0.3 for good images

CLIP is one of transformers' making, read from a folder or the hub; nothing is imported before it is asked for. Prompts
are cut at a word to what its text encoder takes (77 tokens), as they are where images are made of them. In its place
`zoo` is the zoo's dual encoder, which knows emoji and their names: its score is about .7 for real pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ts_adapt.interfaces import TsAdaptError, one_line
from ts_adapt.prompts import token_count, trimmed
from ts_adapt.zoo.data import to_model_range, to_uint8
from ts_adapt.zoo.features import EMOJI, load_matching

ZOO = "zoo"
ClipScore = Callable[[Tensor, Sequence[str]], Tensor]
"""(images `(B, C, H, W)` in [-1, 1] with C 1 or 3, B prompts) -> `(B,)`."""


def clip_scorer(weights: str, device: torch.device | str = "cpu") -> ClipScore:
    """The CLIP score by the model `weights`: a folder, a hub id such as openai/clip-vit-base-patch16, or `zoo`.

    Raises TsAdaptError where transformers is not installed, and where the weights are not to be had as safetensors.
    """
    if weights == ZOO:
        return _by_zoo(device)
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
        _check(images, prompts)
        pixels = to_uint8(images).expand(-1, 3, -1, -1).cpu()
        seen = processor(images=list(pixels), return_tensors="pt", input_data_format="channels_first")
        short = trimmed(prompts, token_count(tokenizer), longest)
        words = tokenizer(short, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        out = model(**seen.to(device), **words.to(device))
        return F.cosine_similarity(out.image_embeds, out.text_embeds).float().cpu()

    return score


def _by_zoo(device: torch.device | str) -> ClipScore:
    net = load_matching(device=device)

    @torch.no_grad()
    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        _check(images, prompts)
        if tuple(images.shape[1:]) != EMOJI.shape:
            raise TsAdaptError(
                f"the zoo's dual encoder knows pictures of 3 x 64 x 64, and these are {tuple(images.shape[1:])}; "
                "name a CLIPModel in evaluate.clip, or leave it out"
            )
        seen = net.pictures(to_model_range(to_uint8(images)).to(device))
        return (seen * net.captions(net.numbers(list(prompts)).to(device))).sum(1).cpu()

    return score


def _check(images: Tensor, prompts: Sequence[str]) -> None:
    if len(images) != len(prompts):
        raise TsAdaptError(f"there are {len(images)} images and {len(prompts)} prompts; give a prompt for each")
