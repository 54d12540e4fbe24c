"""A CLIP of transformers that knows nothing, in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def tiny_clip(folder: Path, tokenizer: Any) -> Path:
    """The folder, with a model for images of 16 x 16 and prompts of eight tokens."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 100, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=8)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
