"""The networks that look at pictures `(B, C, H, W)` in [-1, 1] of the data that models of the zoo were trained on.

    FeatureNet    h_k = relu(conv_k(h_{k-1})), a classifier: what distances compare, for schedules are learned by them
    Judge         residual, normalised by groups: what only scores, and no loss has seen
    DualEncoder   how well a picture and a caption go together: CLIP (Radford et al. 2021) on the scale of the zoo

No two share architecture, seed and task. FeatureNet is trained with batch normalisation, which is then folded into the
convolutions: normalising by fixed statistics is an affine map of each channel, so what is left are plain convolutions,
fast enough to differentiate through in a search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from ts_adapt.errors import TsAdaptError

Shape = tuple[int, int, int]
"""(C, H, W) of a picture."""
GREY: Shape = (1, 28, 28)
CHANNELS, STRIDES = (16, 32, 48, 96, 128), (1, 2, 1, 2, 2)
JUDGED = (24, 48, 96, 160)
SEEN, NUMBERS, WORD = (32, 64, 128), 128, 64


@dataclass(frozen=True)
class Features:
    """maps    one `(B, C_k, H_k, W_k)` a stage
    pooled  `(B, D)`: the mean of the last over its places
    """

    maps: tuple[Tensor, ...]
    pooled: Tensor


class FeatureNet(nn.Module):
    """A small classifier of images `(B, *shape)` in [-1, 1] -> `Features`, whose maps are not negative.

    Smaller or larger networks of the same kind come from other `channels` and `strides`, one number a stage.
    """

    def __init__(
        self,
        channels: tuple[int, ...] = CHANNELS,
        strides: tuple[int, ...] = STRIDES,
        classes: int = 10,
        shape: Shape = GREY,
    ) -> None:
        super().__init__()
        self.shape = shape
        inputs = (shape[0], *channels[:-1])
        self.stages = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride, padding=1) for i, o, stride in zip(inputs, channels, strides, strict=True)
        )
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Features:
        """The feature maps and pooled features of `x`; TsAdaptError for images of another shape."""
        check_shape("feature network", x, self.shape)
        maps = []
        for stage in self.stages:
            x = F.relu(stage(x))
            maps.append(x)
        return Features(tuple(maps), x.mean((2, 3)))

    def classify(self, x: Tensor) -> Tensor:
        """The class scores (logits) `(B, classes)` of images `x`."""
        scores: Tensor = self.head(self.forward(x).pooled)
        return scores


class Block(nn.Module):
    """conv(x) + conv(silu(norm(conv(silu(norm(x))))), half as many places a side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in (inputs, outputs))
        self.convolutions = nn.ModuleList((nn.Conv2d(inputs, outputs, 3, 2, 1), nn.Conv2d(outputs, outputs, 3, 1, 1)))
        self.beside = nn.Conv2d(inputs, outputs, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            y = convolution(F.silu(norm(y)))
        found: Tensor = self.beside(x) + y
        return found


class Judge(nn.Module):
    """Images `(B, *shape)` in [-1, 1] -> the `Features` of a residual network, and of these `classes` scores."""

    def __init__(self, classes: int, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.stem = nn.Conv2d(shape[0], JUDGED[0], 4, 2, 1)
        self.blocks = nn.ModuleList(Block(inputs, outputs) for inputs, outputs in pairwise(JUDGED))
        self.norm = nn.GroupNorm(8, JUDGED[-1])
        self.head = nn.Linear(JUDGED[-1], classes)

    def features(self, x: Tensor) -> Features:
        """One map a block, and the mean of the last over its places; TsAdaptError for images of another shape."""
        check_shape("judge", x, self.shape)
        maps, x = [], self.stem(x)
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return Features(tuple(maps), F.silu(self.norm(x)).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.features(x).pooled)
        return scores


class Mixer(nn.Module):
    """x + W_2 gelu(W_1 norm(depthwise 7x7 (x))) at every place (ConvNeXt, Liu et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.places = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.wide, self.narrow = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.narrow(F.gelu(self.wide(self.norm(self.places(x)))))
        return found


class DualEncoder(nn.Module):
    """Pictures `(B, 3, 64, 64)` in [-1, 1] and words `(B, L)`, 0 for none, -> `(B, 128)` each, of length 1.

    scores = exp(s) p_i . c_j       words are read by a recurrent network both ways

    words  that it knows; of other ones in a caption it takes no notice
    """

    def __init__(self, words: list[str]) -> None:
        super().__init__()
        self.place = {word: number for number, word in enumerate(words, start=1)}
        stages: list[nn.Module] = [nn.Conv2d(3, SEEN[0], 4, 4), Mixer(SEEN[0])]
        for inputs, outputs in pairwise(SEEN):
            stages += [nn.Conv2d(inputs, outputs, 2, 2), Mixer(outputs), Mixer(outputs)]
        self.see = nn.Sequential(*stages)
        self.of_picture = nn.Linear(SEEN[-1], NUMBERS)
        self.words = nn.Embedding(len(words) + 1, WORD, padding_idx=0)
        self.read = nn.GRU(WORD, NUMBERS // 2, batch_first=True, bidirectional=True)
        self.of_caption = nn.Linear(NUMBERS, NUMBERS)
        self.sharpness = nn.Parameter(torch.tensor(math.log(10.0)))

    def numbers(self, captions: list[str]) -> Tensor:
        """The places of the captions' words, from 1, `(n, L)`; 0 after the end."""
        known = [[self.place[word] for word in caption.split() if word in self.place] for caption in captions]
        return pad_sequence([torch.tensor(places, dtype=torch.long) for places in known], batch_first=True)

    def pictures(self, x: Tensor) -> Tensor:
        return F.normalize(self.of_picture(self.see(x).mean((2, 3))), dim=1)

    def captions(self, words: Tensor) -> Tensor:
        words = F.pad(words, (0, 1)) if words.shape[1] == 0 else words
        lengths = (words > 0).sum(1).clamp(min=1)
        packed = pack_padded_sequence(self.words(words), lengths.cpu(), batch_first=True, enforce_sorted=False)
        read = pad_packed_sequence(self.read(packed)[0], batch_first=True)[0]
        return F.normalize(self.of_caption(read.sum(1) / lengths[:, None]), dim=1)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """The score of each picture `(B,)` with each caption `(B', L)`: `(B, B')`"""
        return self.sharpness.clamp(max=math.log(50.0)).exp() * self.pictures(x) @ self.captions(words).T


def check_shape(what: str, x: Tensor, shape: Shape) -> None:
    """TsAdaptError unless the images `x` are of the shape that the zoo's network takes."""
    if tuple(x.shape[1:]) != shape:
        raise TsAdaptError(
            f"the zoo's {what} takes images (B, {', '.join(map(str, shape))}); got {tuple(x.shape)}: "
            "give a network of your own, or use a distance without one (l2, l1)"
        )
