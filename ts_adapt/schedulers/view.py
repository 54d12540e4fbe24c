"""What a policy is shown of a pipeline's states: pictures `(B, C, H, W)`, whatever form the loop has them in.

tokens of a picture     Flux, Qwen-Image: (B, HW/4, 4C), 2x2 patches, rows and columns by what the network is told
a film                  (B, C, F, H, W): the frames' channels, one frame behind the other
tokens in a row         (B, L, D), L places of D channels: a picture one pixel high
a row of numbers        (B, C, L): sound, likewise
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ts_adapt.errors import TsAdaptError

View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tokens:
    """From tokens `(B, HW/4, 4C)`, `rows` x `columns` patches, to pictures `(B, C, H, W)`."""

    rows: int
    columns: int

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.rows * self.columns:
            raise TsAdaptError(
                f"the pipeline's {x.shape[1]} tokens are no picture of {self.rows} x {self.columns}; use a schedule "
                "that does not look at the sample"
            )
        return F.pixel_shuffle(x.transpose(1, 2).reshape(x.shape[0], x.shape[2], self.rows, self.columns), 2)


def film(x: Tensor) -> Tensor:
    """`(B, C, F, H, W)` -> `(B, C F, H, W)`."""
    return x.flatten(1, 2)


def tokens_in_a_row(x: Tensor) -> Tensor:
    """`(B, L, D)` -> `(B, D, 1, L)`."""
    return x.transpose(1, 2)[:, :, None]


def row(x: Tensor) -> Tensor:
    """`(B, C, L)` -> `(B, C, 1, L)`."""
    return x[:, :, None]


def view_of(x: Tensor, given: dict[str, Any], channels: int | None) -> View | None:
    """How the states `x` of a network's call become pictures; None where they are some.

    given     its arguments by name: `img_ids`, or `img_shapes`, number a picture's tokens
    channels  that the network takes, by its config
    """
    if x.ndim == 5:
        return film
    if x.ndim != 3:
        return None
    positions, shapes = given.get("img_ids"), given.get("img_shapes")
    if isinstance(positions, Tensor) and positions.shape[-1] == 3:
        last = positions.reshape(-1, 3)[-1]
        return Tokens(int(last[1]) + 1, int(last[2]) + 1)
    if shapes is not None and len(shapes[0]) == 1:
        frames, rows, columns = shapes[0][0]
        if frames == 1:
            return Tokens(rows, columns)
    return tokens_in_a_row if x.shape[-1] == channels else row
