"""The dual encoder's training, by CLIP's loss (Radford et al. 2021), with words and a seed of its own.

scores of a batch, each picture with each caption        loss = (cross-entropy over captions + over pictures) / 2
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from emoji.data import Data
from emoji.judges import moved
from training import Plan, train
from ts_adapt.storage.files import write_json, write_tensors
from ts_adapt.zoo.data import to_model_range
from ts_adapt.zoo.features import MATCHING, WORDS
from ts_adapt.zoo.networks import DualEncoder

OF = 64
"""Captions that the right one is to be found among."""


def train_matching(data: Data, plan: Plan) -> None:
    """Train the dual encoder, or on; it is written to `plan.out` with its words and how often it is right."""
    torch.manual_seed(plan.seed)
    seen, held_out = data.part(False), data.part(True)
    words = sorted({word for caption in seen.captions for word in caption.split()})
    net = DualEncoder(words)
    said, said_of_held_out = (net.numbers(part.captions) for part in (seen, held_out))
    rows, x = seen.pictures, to_model_range(held_out.pictures)

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
        write_tensors(plan.out / MATCHING, net.state_dict())
        write_json(plan.out / WORDS, words)
        write_json(plan.out / "accuracy.json", {"right of 64": found(net, x, said_of_held_out)})

    train(net, plan, {"what": "matching"}, loss, measure, write)


@torch.no_grad()
def found(net: DualEncoder, x: Tensor, words: Tensor) -> float:
    """The share of the pictures `(n, 3, 64, 64)` whose own caption scores best among OF; what is left of n is left."""
    whole = len(x) // OF * OF or len(x)
    right = [
        net(part, of_part).argmax(1) == torch.arange(len(part))
        for part, of_part in zip(x[:whole].split(OF), words[:whole].split(OF), strict=True)
    ]
    return torch.cat(right).double().mean().item()
