"""Two feature networks for the data: one for distances that schedules are learned by, one that only scores.

    distance   FeatureNet of the zoo, trained with batch normalisation that is then folded in; says group and style
    judge      `Judge`: residual, normalised by groups; says which words are in the caption, of those that are in RARE

They share neither architecture nor seed nor task. Each is trained on the pictures that trainings see, moved by up to
REACH pixels, and written as a safetensors file of its weights, float32, with the share of right answers of the held-out
pictures in accuracy.json.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.nn import functional as F

from emoji.captions import GROUPS
from emoji.data import SIZE, STYLES, Data
from train_classifier import Normalised, judged, scored
from training import Plan, train
from ts_adapt.storage.files import write_json, write_tensors
from ts_adapt.zoo.data import to_model_range
from ts_adapt.zoo.features import EMOJI, JUDGE, JUDGED, WEIGHTS
from ts_adapt.zoo.networks import Judge

REACH, RARE, APART = 3, 20, 7
"""Pixels of movement; how often a word is said to be known; of how many pictures one is left out of statistics."""


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
        write_tensors(plan.out / WEIGHTS, folded.state_dict())
        answers = torch.stack([part.argmax(1) for part in scored(folded.classify, x).split(shapes, 1)], 1)
        right = (answers == of_x).double().mean(0).tolist()
        write_json(plan.out / "accuracy.json", dict(zip(("group", "style"), right, strict=True)))

    net = Normalised(EMOJI.channels, EMOJI.strides, sum(shapes), EMOJI.shape)
    train(net, plan, {"what": "distance"}, loss, lambda net: apart(scored(net, x), of_x).item(), write)


def train_judge(data: Data, plan: Plan) -> None:
    """Train the network that scores, or on."""
    torch.manual_seed(plan.seed)
    seen, held_out = data.part(False), data.part(True)
    counts = Counter(word for caption in seen.captions for word in caption.split())
    words = sorted(word for word, count in counts.items() if count >= RARE)
    said, said_of_held_out = _words(seen, words), _words(held_out, words)
    rows, x = seen.pictures, held_out.pictures
    apart = torch.arange(len(data.pictures)) % APART == 0

    def loss(net: Judge, count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(rows), (count,), generator=generator)
        scores = net(moved(rows[chosen], generator))
        return F.binary_cross_entropy_with_logits(scores, said[chosen]) * len(words)

    def measure(net: Judge) -> float:
        return F.binary_cross_entropy_with_logits(scored(net, x), said_of_held_out).item() * len(words)

    def write(net: Judge) -> None:
        write_tensors(plan.out / JUDGE, net.state_dict())
        others = data.pictures[apart]
        mixed = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(0))]
        write_tensors(plan.out / JUDGED, judged(net, data.pictures[~apart], mixed))  # any first ones are of all kinds
        write_json(plan.out / "words.json", words)
        found = scored(net, x) > 0
        right = (found & said_of_held_out.bool()).sum().double()
        accuracy = {"precision": right / found.sum().clamp(min=1), "recall": right / said_of_held_out.sum()}
        write_json(plan.out / "accuracy.json", {name: share.item() for name, share in accuracy.items()})

    train(Judge(len(words), EMOJI.shape), plan, {"what": "judge"}, loss, measure, write)


def moved(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 pictures `(B, 3, 64, 64)` in [-1, 1], each moved by up to REACH pixels each way over white."""
    padded = F.pad(to_model_range(pictures), (REACH,) * 4, value=1.0)
    places = torch.randint(2 * REACH + 1, (len(pictures), 2), generator=generator).tolist()
    return torch.stack([x[:, y : y + SIZE, z : z + SIZE] for x, (y, z) in zip(padded, places, strict=True)])


def _kinds(data: Data, styles: list[str]) -> Tensor:
    return torch.tensor([(entry.group, styles.index(entry.style)) for entry in data.entries])


def _words(data: Data, words: list[str]) -> Tensor:
    return torch.tensor([[float(word in said) for word in words] for said in map(str.split, data.captions)])
