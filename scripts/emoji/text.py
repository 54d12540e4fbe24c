"""Prompts: a tokenizer made from the captions, and small text encoders of CLIP's kind that are trained along.

Byte pairs are merged until every word of the captions is one token. The vocabulary is laid out as CLIP's: the 256
bytes, the same at the end of a word, one token a merge, start, end. So any text can be written, and its end is the
highest token. LENGTH tokens hold the longest caption.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

from ts_adapt.storage.files import read_json, write_json

LENGTH = 16
END_OF_WORD, START, END = "</w>", "<|startoftext|>", "<|endoftext|>"
DROPPED = 0.1
"""The share of prompts that a training replaces by the empty one, for guidance."""


def tokenizer_of(captions: list[str]) -> CLIPTokenizer:
    """A tokenizer whose merges are those of the captions' words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    pairs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    everything = trainers.BpeTrainer(
        vocab_size=2**20, min_frequency=1, end_of_word_suffix=END_OF_WORD, initial_alphabet=letters, show_progress=False
    )
    pairs.train_from_iterator(sorted({word for caption in captions for word in caption.split()}), everything)
    merges: Any = [tuple(pair) for pair in json.loads(pairs.to_str())["model"]["merges"]]
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocabulary, merges, model_max_length=LENGTH)


def finish(pipeline: Path, tokenizer: CLIPTokenizer) -> None:
    """Have the pipeline in the folder read alike by all releases of transformers.

    Its tokenizers become the files that CLIPTokenizer has had from the start, and its text encoders, whose weights are
    in float16, say that they are computed with in float32, as diffusers takes the other networks by itself.
    """
    for folder in pipeline.glob("tokenizer*"):
        (folder / "tokenizer.json").unlink()
        tokenizer.backend_tokenizer.model.save(str(folder))
    for path in pipeline.glob("text_encoder*/config.json"):
        write_json(path, read_json(path) | {"dtype": "float32"})


def tokens(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """The tokens `(n, LENGTH)` of the prompts, as pipelines make them."""
    padded = tokenizer(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    found: Tensor = padded.input_ids
    return found


def with_dropped(prompts: Tensor, empty: Tensor, generator: torch.Generator) -> Tensor:
    """`prompts` `(n, LENGTH)` with each in DROPPED of the cases replaced by the `empty` one `(1, LENGTH)`."""
    dropped = torch.rand(len(prompts), 1, generator=generator) < DROPPED
    return torch.where(dropped, empty, prompts)


def config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    """A text encoder `width` wide, with heads of 32."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
