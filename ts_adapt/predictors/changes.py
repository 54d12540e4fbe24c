"""Learned changes of pictures, by a small network of their own: of the start, and of every x0.

    start      x_T' = x_T + sigma_T d(W_N)       once the network has seen x_T, the first step begins at another state
    residual   x0_i' = x0_i + d(W_N,i)           every step is taken with another prediction; recursive predictors alone
    d(W) = r tanh(W g / r)                       g = blocks of dilated convolutions over (the picture, h)

The picture is what the predictor sees at that place, by its mean and deviation there, and h what its encoder makes of
that and of the condition (`encoder`): what is far away in the state, and what was asked for, reaches every pixel
through h. A recursive predictor's depend on the x0 just computed too; none costs an evaluation. W starts at zero:
untrained, they change nothing. ("Faithful previews", 2026, adds such a residual to the noise itself.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.interfaces import START, Condition, Node
from ts_adapt.policies import Around, check_next

BOUND = 0.5
"""r: how far a number may be moved: of the state in sigma_T, of x0 as it is, whose numbers are about 1."""
WIDTH = 32
DILATIONS = (1, 2, 4, 8)


class Change(nn.Module):
    """d `(B, outputs, H, W)` of a picture `(B, channels, H, W)`, h `(B, hidden)` and a place.

    places  how many weights W there are: of the start one for each N, of the residual one for each step of each N
    """

    def __init__(self, channels: int, outputs: int, hidden: int, places: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, WIDTH, 3, stride=2, padding=1)
        self.context = nn.Linear(hidden, WIDTH)
        self.blocks = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=d, dilation=d) for d in DILATIONS)
        self.weight = nn.Parameter(torch.zeros(places, 4 * outputs, WIDTH))

    def forward(self, seen: Tensor, h: Tensor, place: int) -> Tensor:
        features = self.first(seen) + self.context(h)[:, :, None, None]
        for block in self.blocks:
            features = features + block(nn.functional.silu(features))
        coarse = torch.einsum("oc,bchw->bohw", self.weight[place], nn.functional.silu(features))
        change = nn.functional.pixel_shuffle(coarse, 2)[..., : seen.shape[-2], : seen.shape[-1]]
        return BOUND * torch.tanh(change / BOUND)


@dataclass(frozen=True)
class Moved(Around):
    """`policy`, whose first step begins at x_T + `change(x_T, x0, t, condition)`; from inside it is `policy` itself."""

    change: Callable[[Tensor, Tensor, Tensor, Condition], Tensor]

    def init(self, x_T: Tensor, condition: Condition) -> tuple[Node, Any]:
        node, state = self.policy.init(x_T, condition)
        return node, (state, condition)

    def next(self, x_t: Tensor, x0: Tensor, node: Node, state: Any) -> tuple[Node, Any]:
        state, condition = state
        found, state = self.policy.next(x_t, x0, node, state)
        if node.index == 0:
            change = self.change(x_t, x0, node.t, condition)
            found = Node.of(found.index, found.steps, found.t, {**found.held, START: change})
            check_next(node, found)
        return found, (state, condition)
