"""Two feature networks for the data: one for distances that schedules are learned by, one that only scores.

    distance   FeatureNet of the zoo, trained with batch normalisation that is then folded in; says group and style
    judge      `Judge`: residual, normalised by groups; says which words are in the caption, of those that are in RARE

They share neither architecture nor seed nor task. Each is trained on the pictures that trainings see, moved by up to
REACH pixels, and written as a safetensors file of its weights, float32, with the share of right answers of the held-out
pictures in accuracy.json.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoji.captions import GROUPS
from emoji.data import SIZE, STYLES, Data, in_model_range
from train_classifier import Normalised
from training import Plan, train
from ts_adapt.storage.files import write_json, write_tensors
from ts_adapt.zoo.features import Features

REACH, RARE = 3, 20
CHANNELS, STRIDES = (24, 32, 64, 96, 128), (2, 1, 2, 2, 2)
WIDTHS = (24, 48, 96, 160)


class Block(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))), twice as coarse if `halved`."""

    def __init__(self, inputs: int, outputs: int, halved: bool) -> None:
        super().__init__()
        stride = 2 if halved else 1
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in (inputs, outputs))
        self.convolutions = nn.ModuleList(
            (nn.Conv2d(inputs, outputs, 3, stride, 1), nn.Conv2d(outputs, outputs, 3, 1, 1))
        )
        self.beside = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            y = convolution(F.silu(norm(y)))
        found: Tensor = self.beside(x) + y
        return found


class Judge(nn.Module):
    """Pictures `(B, 3, 64, 64)` in [-1, 1] -> the `Features` of a residual network, and of these scores of words."""

    def __init__(self, classes: int, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 4, 2, 1)
        self.blocks = nn.ModuleList(Block(inputs, outputs, halved=True) for inputs, outputs in pairwise(widths))
        self.norm = nn.GroupNorm(8, widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def features(self, x: Tensor) -> Features:
        """One map a block, and the mean of the last over its places."""
        maps, x = [], self.stem(x)
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return Features(tuple(maps), F.silu(self.norm(x)).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.features(x).pooled)
        return scores


def train_distance(data: Data, plan: Plan) -> None:
    """Train the network for distances, or on."""
    torch.manual_seed(plan.seed)
    styles = list(STYLES)
    seen, held_out = data.part(False), data.part(True)
    (rows, of_rows), (x, of_x) = ((part.pictures, _kinds(part, styles)) for part in (seen, held_out))
    shapes = [len(GROUPS), len(styles)]

    def apart(scores: Tensor, kinds: Tensor) -> Tensor:
        parts = zip(scores.split(shapes, 1), kinds.unbind(1), strict=True)
        return torch.stack([F.cross_entropy(of, kind, label_smoothing=0.1) for of, kind in parts]).sum()

    def loss(net: Normalised, count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(rows), (count,), generator=generator)
        return apart(net(moved(rows[chosen], generator)), of_rows[chosen])

    def write(net: Normalised) -> None:
        folded = net.folded()
        write_tensors(plan.out / "distance.safetensors", folded.state_dict())
        answers = torch.stack([part.argmax(1) for part in scored(folded.classify, x).split(shapes, 1)], 1)
        right = (answers == of_x).double().mean(0).tolist()
        write_json(plan.out / "accuracy.json", dict(zip(("group", "style"), right, strict=True)))

    net = Normalised(CHANNELS, STRIDES, sum(shapes), (3, SIZE, SIZE))
    train(net, plan, {"what": "distance"}, loss, lambda net: apart(scored(net, x), of_x).item(), write)


def train_judge(data: Data, plan: Plan) -> None:
    """Train the network that scores, or on."""
    torch.manual_seed(plan.seed)
    seen, held_out = data.part(False), data.part(True)
    counts = Counter(word for caption in seen.captions for word in caption.split())
    words = sorted(word for word, count in counts.items() if count >= RARE)
    said, said_of_held_out = _words(seen, words), _words(held_out, words)
    rows, x = seen.pictures, held_out.pictures

    def loss(net: Judge, count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(rows), (count,), generator=generator)
        scores = net(moved(rows[chosen], generator))
        return F.binary_cross_entropy_with_logits(scores, said[chosen]) * len(words)

    def measure(net: Judge) -> float:
        return F.binary_cross_entropy_with_logits(scored(net, x), said_of_held_out).item() * len(words)

    def write(net: Judge) -> None:
        write_tensors(plan.out / "judge.safetensors", net.state_dict())
        write_json(plan.out / "words.json", words)
        found = scored(net, x) > 0
        right = (found & said_of_held_out.bool()).sum().double()
        accuracy = {"precision": right / found.sum().clamp(min=1), "recall": right / said_of_held_out.sum()}
        write_json(plan.out / "accuracy.json", {name: share.item() for name, share in accuracy.items()})

    train(Judge(len(words)), plan, {"what": "judge"}, loss, measure, write)


def moved(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 pictures `(B, 3, 64, 64)` in [-1, 1], each moved by up to REACH pixels each way over white."""
    padded = F.pad(in_model_range(pictures), (REACH,) * 4, value=1.0)
    places = torch.randint(2 * REACH + 1, (len(pictures), 2), generator=generator).tolist()
    return torch.stack([x[:, y : y + SIZE, z : z + SIZE] for x, (y, z) in zip(padded, places, strict=True)])


@torch.no_grad()
def scored(net: nn.Module, pictures: Tensor) -> Tensor:
    """What `net` says of uint8 pictures, a part at a time."""
    return torch.cat([net(in_model_range(part)) for part in pictures.split(128)])


def _kinds(data: Data, styles: list[str]) -> Tensor:
    return torch.tensor([(entry.group, styles.index(entry.style)) for entry in data.entries])


def _words(data: Data, words: list[str]) -> Tensor:
    return torch.tensor([[float(word in said) for word in words] for said in map(str.split, data.captions)])
