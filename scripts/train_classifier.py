"""Train the networks of the zoo that look at Fashion-MNIST, and write all that lies in ts_adapt/zoo/fashion-mnist.

    python scripts/train_zoo.py classifier --epochs 10
    python scripts/train_zoo.py judge --images 400000 --batch 128 --lr 2e-3 --seed 1

A classifier of Fashion-MNIST: label smoothing, shifts of up to two pixels, SGD with Nesterov momentum, the learning
rate warmed up and then falling along a cosine. Batch normalisation is folded into the convolutions at the end:

    gamma (w * x - mean) / std + beta  =  (gamma / std) w * x + (beta - gamma mean / std)

Written are the folded weights, the statistics of the training images' pooled features, and the test images.

The judge is a classifier too, of another architecture and seed, by AdamW; written are its weights, the statistics of
its features of the training images, and those features of some test images.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from training import Plan
from training import train as train_on
from ts_adapt.evaluation.metrics import FeatureStatistics
from ts_adapt.storage.files import write_tensors
from ts_adapt.zoo.data import load_fashion_mnist, to_model_range
from ts_adapt.zoo.features import FASHION, FOLDER, JUDGE, JUDGED, STATISTICS, TEST_IMAGES, WEIGHTS, pooled_features
from ts_adapt.zoo.networks import CHANNELS, GREY, STRIDES, FeatureNet, Judge, Shape

JUDGED_APART = 2000
"""Test images whose features the judge's file holds."""


class Normalised(nn.Module):
    """FeatureNet with batch normalisation after each convolution."""

    def __init__(
        self,
        channels: tuple[int, ...] = CHANNELS,
        strides: tuple[int, ...] = STRIDES,
        classes: int = 10,
        shape: Shape = GREY,
    ) -> None:
        super().__init__()
        self.made_with = channels, strides, classes, shape
        inputs = (shape[0], *channels[:-1])
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, 3, s, 1, bias=False) for i, o, s in zip(inputs, channels, strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in channels)
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores

    @torch.no_grad()
    def folded(self) -> FeatureNet:
        net = FeatureNet(*self.made_with)
        stages: Any = zip(net.stages, self.convolutions, self.norms, strict=True)
        for stage, convolution, norm in stages:
            gain = norm.weight / (norm.running_var + norm.eps).sqrt()
            stage.weight.copy_(gain[:, None, None, None] * convolution.weight)
            stage.bias.copy_(norm.bias - gain * norm.running_mean)
        net.head.load_state_dict(self.head.state_dict())
        return net.eval()


def shifted(images: Tensor, reach: int) -> Tensor:
    """Each image moved by up to `reach` pixels each way; what comes in is background (-1)."""
    n, _, height, width = images.shape
    padded = F.pad(images, (reach,) * 4, value=-1.0)
    down, right = torch.randint(2 * reach + 1, (2, n, 1, 1))
    rows, columns = down + torch.arange(height)[:, None], right + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], 0, rows, columns].unsqueeze(1)


@torch.no_grad()
def scored(net: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
    """What `net` says of uint8 pictures, a part at a time."""
    return torch.cat([net(to_model_range(part)) for part in pictures.split(128)])


def accuracy(net: Callable[[Tensor], Tensor], pictures: Tensor, labels: Tensor) -> float:
    return (scored(net, pictures).argmax(1) == labels).double().mean().item()


def train(images: Tensor, labels: Tensor, epochs: int, batch: int, peak: float) -> Normalised:
    net = Normalised().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=peak, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps_per_epoch, started = len(images) // batch, time.time()
    total = epochs * steps_per_epoch
    for epoch in range(epochs):
        order, losses = torch.randperm(len(images)), []
        for i in range(steps_per_epoch):
            done = (epoch * steps_per_epoch + i + 1) / total
            for group in optimizer.param_groups:
                group["lr"] = peak * min(done / 0.05, 0.5 + 0.5 * math.cos(math.pi * done))
            rows = order[i * batch : (i + 1) * batch]
            loss = F.cross_entropy(net(shifted(images[rows], 2)), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        seconds, mean = round(time.time() - started), round(sum(losses) / len(losses), 4)
        print(json.dumps({"epoch": epoch + 1, "seconds": seconds, "train": mean}), flush=True)
    return net.eval()


def train_classifier(out: Path | None, epochs: int, batch: int, peak: float, seed: int) -> None:
    """Train, fold, print the test accuracy, and write the zoo's files under `out`."""
    out = out or FOLDER
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    images, labels = load_fashion_mnist("train")
    test, test_labels = load_fashion_mnist("test")
    data = to_model_range(images)
    net = train(data, labels, epochs, batch, peak).folded()
    print(json.dumps({"test_accuracy": accuracy(net.classify, test, test_labels)}), flush=True)
    features = pooled_features(net, data).double()
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, out / WEIGHTS)
    save_file({"mean": features.mean(0), "covariance": features.T.cov().contiguous()}, out / STATISTICS)
    np.savez_compressed(out / TEST_IMAGES, images=test.squeeze(1).numpy(), labels=test_labels.to(torch.uint8).numpy())
    for name in (WEIGHTS, STATISTICS):
        (out / name).chmod(0o644)


def train_judge(plan: Plan) -> None:
    """Train the judge, or on; what lies in the zoo of it is written under `plan.out`."""
    torch.manual_seed(plan.seed)
    (images, labels), (test, test_labels) = load_fashion_mnist("train"), load_fashion_mnist("test")

    def loss(net: Judge, count: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (count,), generator=generator)
        return F.cross_entropy(net(shifted(to_model_range(images[rows]), 2)), labels[rows], label_smoothing=0.1)

    def measure(net: Judge) -> float:
        return F.cross_entropy(scored(net, test), test_labels).item()

    def write(net: Judge) -> None:
        print(json.dumps({"test_accuracy": accuracy(net, test, test_labels)}), flush=True)
        write_tensors(plan.out / JUDGE, net.state_dict())
        write_tensors(plan.out / JUDGED, judged(net, images, test[:JUDGED_APART]))

    train_on(FASHION.judge(), plan, {"what": "judge"}, loss, measure, write)


@torch.no_grad()
def judged(net: Judge, images: Tensor, others: Tensor) -> dict[str, Tensor]:
    """What `JUDGED` holds: statistics of the features of uint8 `images`, and the features of `others` in float16."""
    of_data = FeatureStatistics()
    for part in images.split(500):
        of_data.update(net.features(to_model_range(part)).pooled)
    features = torch.cat([net.features(to_model_range(part)).pooled for part in others.split(500)])
    return {
        "mean": torch.from_numpy(of_data.mean),
        "covariance": torch.from_numpy(of_data.covariance),
        "count": torch.tensor([of_data.count]),
        "features": features.half(),
    }
