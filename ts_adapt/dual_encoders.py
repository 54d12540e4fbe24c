"""Networks that see pictures and captions in one space: how well an image shows what its prompt says.

    score = cos(f(image), g(prompt))        CLIP (Radford et al. 2021); the CLIP score of Hessel et al. 2021

`zoo` is the embedded one, which knows emoji and their names; all others are CLIP models of transformers' making, read
from a folder or the hub; nothing is imported before it is asked for. Prompts are cut at a word to what the text encoder
takes (77 tokens), as they are where images are made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ts_adapt.errors import TsAdaptError, one_line
from ts_adapt.prompts import token_count, trimmed
from ts_adapt.zoo.data import to_model_range, to_uint8
from ts_adapt.zoo.features import EMOJI, load_matching

ZOO = "zoo"


class DualEncoder(Protocol):
    """f and g, whose values `(B, D)` are of length 1; images are `(B, C, H, W)` in [-1, 1] with C 1 or 3.

    Raises TsAdaptError for images of a size that it does not take.
    """

    def pictures(self, images: Tensor) -> Tensor:
        """f, differentiable; no less for what is outside of the range than at its end."""
        ...

    def rounded(self, images: Tensor) -> Tensor:
        """f of images that are rounded to 8 bits, prepared as they are for published scores."""
        ...

    def captions(self, prompts: Sequence[str]) -> Tensor:
        """g."""
        ...


def load(name: str, device: torch.device | str, option: str) -> DualEncoder:
    """The dual encoder called `name`: a folder, a hub id such as openai/clip-vit-base-patch16, or `zoo`; frozen.

    option  that asks for it, for messages

    Raises TsAdaptError where transformers is not installed, and where the weights are not to be had as safetensors.
    """
    return _OfZoo(device, option) if name == ZOO else _OfTransformers(name, device, option)


def same(name: str, other: str) -> bool:
    """Whether two names are those of one network, as far as names tell."""
    return Path(name).resolve() == Path(other).resolve()


class _OfZoo:
    def __init__(self, device: torch.device | str, option: str) -> None:
        self.net, self.device, self.option = load_matching(device=device), device, option

    def pictures(self, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != EMOJI.shape:
            raise TsAdaptError(
                f"the zoo's dual encoder knows pictures of 3 x 64 x 64, and these are {tuple(images.shape[1:])}; "
                f"name a CLIPModel in {self.option}, or leave it out"
            )
        return self.net.pictures(images.to(self.device, self.net.sharpness.dtype).clamp(-1, 1))

    def rounded(self, images: Tensor) -> Tensor:
        return self.pictures(to_model_range(to_uint8(images)))

    def captions(self, prompts: Sequence[str]) -> Tensor:
        return self.net.captions(self.net.numbers(list(prompts)).to(self.device))


class _OfTransformers:
    def __init__(self, weights: str, device: torch.device | str, option: str) -> None:
        try:
            from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
        except ImportError as error:
            raise TsAdaptError(
                f"the CLIP score needs transformers ({error}); pip install 'ts_adapt[text]', or leave {option} out"
            ) from error
        try:
            model: Any = CLIPModel.from_pretrained(weights, use_safetensors=True).eval().requires_grad_(False)
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(weights)
            self.processor: Any = CLIPImageProcessor.from_pretrained(weights)
        except (OSError, ValueError) as error:
            raise TsAdaptError(
                f"the CLIP weights {weights!r} cannot be had ({one_line(error)}); give a folder of a CLIPModel, "
                f"with its weights as safetensors, or leave {option} out"
            ) from error
        self.model, self.device, self.option = model.to(device), device, option
        self.longest = model.config.text_config.max_position_embeddings

    def pictures(self, images: Tensor) -> Tensor:
        """What the processor does, in the floating point numbers as they are."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as TF

        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise TsAdaptError(
                f"CLIP knows pictures of one or three channels, and these are {tuple(images.shape[1:])}; leave "
                f"{self.option} out"
            )
        known, x = self.processor, images.to(self.device, self.model.dtype).clamp(-1, 1).expand(-1, 3, -1, -1)
        size, crop = known.size, known.crop_size
        side = [size["shortest_edge"]] if "shortest_edge" in size else [size["height"], size["width"]]
        x = TF.resize((x + 1) / 2, side, InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        x = TF.center_crop(x, [crop["height"], crop["width"]])
        return self._seen(TF.normalize(x, known.image_mean, known.image_std))

    def rounded(self, images: Tensor) -> Tensor:
        pixels = list(to_uint8(images).expand(-1, 3, -1, -1).cpu())
        seen = self.processor(images=pixels, return_tensors="pt", input_data_format="channels_first")
        return self._seen(seen["pixel_values"])

    def captions(self, prompts: Sequence[str]) -> Tensor:
        short = trimmed(prompts, token_count(self.tokenizer), self.longest)
        words = self.tokenizer(short, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        read = self.model.text_model(**words.to(self.device)).pooler_output
        return F.normalize(self.model.text_projection(read), dim=1)

    def _seen(self, pixels: Tensor) -> Tensor:
        seen = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
        return F.normalize(self.model.visual_projection(seen), dim=1)
