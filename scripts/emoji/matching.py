"""The dual encoder: how well a picture and a caption go together; of another architecture than every other network.

    p, c     a picture's and a caption's 128 numbers, of length 1
    scores   exp(s) p_i . c_j in a batch        loss = (cross-entropy over captions + over pictures) / 2

Pictures go through depthwise convolutions of 7x7 (ConvNeXt, Liu et al. 2022), words through a recurrent network both
ways; the loss is CLIP's (Radford et al. 2021). It has its own list of words and its own seed.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from emoji.data import Data, in_model_range
from emoji.judges import moved
from training import Plan, train
from ts_adapt.storage.files import write_json, write_tensors

WIDTHS, NUMBERS, WORD = (32, 64, 128), 128, 64
OF = 64
"""Captions that the right one is to be found among."""


class Mixer(nn.Module):
    """x + W_2 gelu(W_1 norm(depthwise 7x7 (x))) at every place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.places = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.wide, self.narrow = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.narrow(F.gelu(self.wide(self.norm(self.places(x)))))
        return found


class DualEncoder(nn.Module):
    """Pictures `(B, 3, 64, 64)` in [-1, 1] and words `(B, L)`, 0 for none, -> `(B, 128)` each, of length 1."""

    def __init__(self, words: int, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        stages: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), Mixer(widths[0])]
        for inputs, outputs in pairwise(widths):
            stages += [nn.Conv2d(inputs, outputs, 2, 2), Mixer(outputs), Mixer(outputs)]
        self.see = nn.Sequential(*stages)
        self.of_picture = nn.Linear(widths[-1], NUMBERS)
        self.words = nn.Embedding(words + 1, WORD, padding_idx=0)
        self.read = nn.GRU(WORD, NUMBERS // 2, batch_first=True, bidirectional=True)
        self.of_caption = nn.Linear(NUMBERS, NUMBERS)
        self.sharpness = nn.Parameter(torch.tensor(math.log(10.0)))

    def pictures(self, x: Tensor) -> Tensor:
        return F.normalize(self.of_picture(self.see(x).mean((2, 3))), dim=1)

    def captions(self, words: Tensor) -> Tensor:
        lengths = (words > 0).sum(1).clamp(min=1)
        packed = pack_padded_sequence(self.words(words), lengths, batch_first=True, enforce_sorted=False)
        read = pad_packed_sequence(self.read(packed)[0], batch_first=True)[0]
        return F.normalize(self.of_caption(read.sum(1) / lengths[:, None]), dim=1)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """The score of each picture `(B,)` with each caption `(B', L)`: `(B, B')`"""
        return self.sharpness.clamp(max=math.log(50.0)).exp() * self.pictures(x) @ self.captions(words).T


def train_matching(data: Data, plan: Plan) -> None:
    """Train the dual encoder, or on; it is written to `plan.out` with its words and how often it is right."""
    torch.manual_seed(plan.seed)
    seen, held_out = data.part(False), data.part(True)
    words = sorted({word for caption in seen.captions for word in caption.split()})
    said, said_of_held_out = (numbers(part.captions, words) for part in (seen, held_out))
    rows, x = seen.pictures, in_model_range(held_out.pictures)

    def both_ways(scores: Tensor) -> Tensor:
        right = torch.arange(len(scores))
        return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2

    def loss(net: DualEncoder, count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randperm(len(rows), generator=generator)[:count]
        return both_ways(net(moved(rows[chosen], generator), said[chosen]))

    @torch.no_grad()
    def measure(net: DualEncoder) -> float:
        return both_ways(net(x[:OF], said_of_held_out[:OF])).item()

    def write(net: DualEncoder) -> None:
        write_tensors(plan.out / "matching.safetensors", net.state_dict())
        write_json(plan.out / "words.json", words)
        write_json(plan.out / "accuracy.json", {"right of 64": found(net, x, said_of_held_out)})

    train(DualEncoder(len(words)), plan, {"what": "matching"}, loss, measure, write)


@torch.no_grad()
def found(net: DualEncoder, x: Tensor, words: Tensor) -> float:
    """The share of the pictures `(n, 3, 64, 64)` whose own caption scores best among OF; what is left of n is left."""
    whole = len(x) // OF * OF or len(x)
    right = [
        net(part, of_part).argmax(1) == torch.arange(len(part))
        for part, of_part in zip(x[:whole].split(OF), words[:whole].split(OF), strict=True)
    ]
    return torch.cat(right).double().mean().item()


def numbers(captions: list[str], words: list[str]) -> Tensor:
    """The places of the captions' words in the list, from 1, `(n, L)`; 0 after the end and for other words."""
    place = {word: number for number, word in enumerate(words, start=1)}
    rows = [torch.tensor([place.get(word, 0) for word in caption.split()]) for caption in captions]
    return pad_sequence(rows, batch_first=True)
