"""What stands in for text encoders, tokenizers and image encoders: whatever is asked of them they say with few numbers.

A pipeline reads of an encoder's answer hidden states `(B, L, WIDTH)`, which depend on the words, and of a tokenizer
token ids `(B, L)` and a mask. No pipeline asks more of them than that, whichever library's class it names.
"""

from __future__ import annotations

import re
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput, CLIPVisionModelOutput

from diffusers_zoo.sizes import LAYERS, LENGTH, SIZE, WIDTH

VOCABULARY = 100
PAD, END = 0, 1


class Batch(BatchEncoding):
    """Tensors by name, which go to a device, and to nothing else: token ids stay whole."""

    def to(self, *where: Any, **options: Any) -> Batch:
        return self


class Tokenizer:
    """A token a word, by its checksum; `LENGTH` tokens where nothing else is asked for."""

    def __init__(self) -> None:
        self.padding_side = "right"
        self.tokenizer = self.image_processor = self
        self.image_token_id = 3

    model_max_length = LENGTH
    pad_token_id, pad_token, eos_token = PAD, "<pad>", "</s>"
    merge_size = 2
    added_tokens_encoder: dict[str, int] = {}  # noqa: RUF012

    def __len__(self) -> int:
        return VOCABULARY

    def _ids(self, text: Any) -> list[int]:
        words = re.findall(r"\w+|[^\w\s]", str(text))
        return [*(4 + zlib.crc32(word.encode()) % (VOCABULARY - 4) for word in words), END]

    def __call__(self, text: Any = None, *others: Any, images: Any = None, **options: Any) -> Any:
        texts = [text] if text is None or isinstance(text, str) else list(text)
        ids = [self._ids(one) for one in texts]
        longest, wanted = max(map(len, ids)), options.get("max_length")
        length = wanted or LENGTH if options.get("padding") == "max_length" else min(longest, wanted or longest)
        if options.get("padding") == "max_length" and not options.get("truncation"):
            length = max(length, longest)
        filled = torch.tensor([(one[:length] + [PAD] * length)[:length] for one in ids])
        found: dict[str, Any] = {"input_ids": filled, "attention_mask": (filled != PAD).long()}
        if options.get("return_length"):
            found["length"] = [length] * len(ids)
        if images is not None:
            found |= {"pixel_values": torch.zeros(len(ids), 3, 16, 16), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        if options.get("return_tensors") != "pt":
            found = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in found.items()}
            if isinstance(text, str):
                found = {name: value[0] for name, value in found.items()}
        return Batch(found)

    def apply_chat_template(self, messages: Any, tokenize: bool = True, **options: Any) -> Any:
        several = isinstance(messages[0], list | tuple)
        texts = [str(one) for one in messages] if several else [str(messages)]
        if not tokenize:
            return texts if several else texts[0]
        found = self(texts, padding="max_length", truncation=True, return_tensors="pt", **{
            "max_length": options.get("max_length", LENGTH)
        })  # fmt: skip
        return found if options.get("return_dict") else found.input_ids

    def pad(self, given: Any, **options: Any) -> Any:
        return Batch(given)

    def encode(self, text: str, **options: Any) -> Any:
        return self(text, return_tensors="pt").input_ids if options.get("return_tensors") else self._ids(text)

    def tokenize(self, text: str, **options: Any) -> list[str]:
        return str(text).split()

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        return ["a word"] * len(ids)

    def decode(self, ids: Any, **options: Any) -> str:
        return "a word"

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        return 3 if isinstance(tokens, str) else [3] * len(tokens)


class Placed(nn.Module):
    """A network that says where its weights are, and in what precision."""

    dtype = property(lambda self: next(self.parameters()).dtype)
    device = property(lambda self: next(self.parameters()).device)


class Encoder(Placed):
    """A text encoder: an embedding of the token ids; of as many layers as are asked for, all alike.

    projected  the first of its answer is the pooled text `(B, WIDTH)`, as in CLIPTextModelWithProjection; "twice":
               that and the hidden states are all of it
    """

    def __init__(self, projected: bool | str = False, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        self.embedding, self.projected, self.layers = nn.Embedding(VOCABULARY, width), projected, layers
        sizes = {
            "hidden_size": width, "d_model": width, "num_hidden_layers": layers, "projection_dim": width,
            "max_position_embeddings": LENGTH, "vocab_size": VOCABULARY, "use_attention_mask": False, "image_size": 16,
            "patch_size": 4, "_name_or_path": "", "model_type": "stand-in", "image_token_id": 3, "image_token_index": 3,
            "pad_token_id": PAD,
        }  # fmt: skip
        self.final_layer_norm = nn.Identity()
        self.config = SimpleNamespace(**sizes, text_config=SimpleNamespace(**sizes), to_dict=lambda: sizes)

    @property
    def model(self) -> Encoder:
        return self

    language_model = text_model = model

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Any = None, *others: Any, **options: Any) -> Any:
        return_dict = options.get("return_dict")
        h = self.embedding(input_ids.clamp(0, VOCABULARY - 1))
        h = h + h.mean(1, keepdim=True)
        states = (h,) * (self.layers + 1)
        if self.projected == "twice":
            return h[:, 0], h
        if self.projected:
            found = CLIPTextModelOutput(text_embeds=h[:, 0], last_hidden_state=h, hidden_states=states)
        else:
            found = BaseModelOutputWithPooling(last_hidden_state=h, pooler_output=h[:, 0], hidden_states=states)
        return found.to_tuple() if return_dict is False else found


class ImageEncoder(Placed):
    """An image encoder: a linear map of the colours of 4 x 4 patches."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.map = nn.Conv2d(3, width, 4, 4)
        sizes = {"hidden_size": width, "projection_dim": width, "image_size": 16, "patch_size": 4}
        self.config = SimpleNamespace(**sizes, vision_config=SimpleNamespace(**sizes))

    def forward(self, pixel_values: Tensor, **options: Any) -> Any:
        h = self.map(pixel_values).flatten(2).transpose(1, 2)
        return CLIPVisionModelOutput(image_embeds=h.mean(1), last_hidden_state=h, hidden_states=(h,) * 4)


class ImageProcessor:
    """Pictures of 16 x 16 for `ImageEncoder`, the middle of the values that they are given in."""

    crop_size: dict[str, int] = {"height": 16, "width": 16}  # noqa: RUF012

    def __call__(self, images: Any = None, return_tensors: str | None = None, **options: Any) -> Any:
        several = len(images) if isinstance(images, list | tuple | Tensor) else 1
        return Batch({"pixel_values": torch.full((several, 3, 16, 16), 0.5)})

    def preprocess(self, images: Any = None, **options: Any) -> Any:
        return self(images, **options)


class Words:
    """`ftfy`, which repairs the words of prompts: these are whole."""

    @staticmethod
    def fix_text(text: str) -> str:
        return text


class SafetyChecker(nn.Module):
    """The guardrail of Cosmos: nothing is unsafe."""

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def picture(row: int = 0, size: int = SIZE) -> Image.Image:
    """One of soft colours, another for each row."""
    ramp = np.linspace(0, 1, size)
    red, green = np.meshgrid(ramp, ramp)
    colours = np.stack([red, green, np.full_like(red, (row % 5) / 5)], axis=-1)
    return Image.fromarray((255 * colours).astype(np.uint8))
