"""Affine quantization: a real number x as an integer code q of b bits.

    q = clamp(round(x / s + z), q_low, q_high)          x^ = s (q - z)

    s    scale, the distance of two neighbouring levels
    z    zero, the code of x = 0; a real number unless it is asked to be an integer
    asymmetric   q in [0, 2^b - 1]
    symmetric    q in [-2^(b-1), 2^(b-1) - 1], z = 0

s and z broadcast with x: `()` for one a tensor, `(G, 1)` for one a row of grouped weights (`to_groups`), `(B, 1, 1, 1)`
for one a sample. Rounding passes its gradient straight through; clamping stops it. The gradient to the scale is that
of LSQ (Esser et al. 2020): (round(v) - v) inside the range and q_low or q_high outside, v = x / s.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError

BITS = (2, 3, 4, 5, 6, 7, 8, 16)
LARGEST_ZERO = 2.0**14
"""A range far from 0 gets no finer scale than |x| / LARGEST_ZERO: z stays in the range of float16."""

SMALLEST_SCALE = 1e-30


def check_bits(bits: int, what: str = "bits") -> None:
    """TsAdaptError, naming `what`, unless `bits` is one of BITS."""
    if isinstance(bits, bool) or bits not in BITS:
        raise TsAdaptError(f"{what} is {bits!r}; expected one of {', '.join(map(str, BITS))}")


def check_group(group: int | str) -> None:
    """TsAdaptError unless `group` is "channel", "tensor" or a positive number."""
    if group not in ("channel", "tensor") and (isinstance(group, bool) or not isinstance(group, int) or group < 1):
        raise TsAdaptError(
            f"group is {group!r}; expected 'channel', 'tensor' or a number of weights that share a scale"
        )


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """The lowest and the highest code."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def scale_and_zero(
    low: Tensor, high: Tensor, bits: int, symmetric: bool, *, exact_zero: bool = False
) -> tuple[Tensor, Tensor]:
    """The scale and zero whose levels span [low, high]; all of one shape.

    symmetric   spans [-m, m], m the larger of |low| and |high|; zero is 0
    exact_zero  the range is widened to hold 0 and z is an integer: x = 0, as of padding, has no error
    """
    if symmetric:
        bound = torch.maximum(low.abs(), high.abs())
        scale = (bound / (2 ** (bits - 1) - 1)).clamp(min=SMALLEST_SCALE)
        return scale, torch.zeros_like(scale)
    if exact_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    far = torch.maximum(low.abs(), high.abs()) / LARGEST_ZERO
    scale = torch.maximum((high - low) / (2**bits - 1), far if bits <= 8 else far * 0).clamp(min=SMALLEST_SCALE)
    zero = -low / scale
    return scale, zero.round() if exact_zero else zero


def round_through(x: Tensor) -> Tensor:
    """round(x), with the gradient of x."""
    return x + (x.round() - x).detach()


def quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool) -> Tensor:
    """The codes of `x`: real numbers of integer value, of its shape, differentiable in x, scale and zero."""
    return round_through((x / scale + zero).clamp(*code_range(bits, symmetric)))


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x^ = s (q - z)."""
    return scale * (codes - zero)


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool) -> Tensor:
    """x^, the nearest level to each x, in the dtype of x; computed in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return dequantize(quantize(wide, scale, zero, bits, symmetric), scale, zero).to(x.dtype)


def lsq(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """x^, symmetric, with a learned scale: its gradient is LSQ's, times 1 / sqrt(n q_high), n the values that share a
    scale."""
    shrink = 1 / math.sqrt(x.numel() / scale.numel() * code_range(bits, True)[1])
    learned = scale * shrink + (scale * (1 - shrink)).detach()
    return fake_quantize(x, learned, torch.zeros_like(scale), bits, True)


def to_groups(weight: Tensor, group: int | str, axis: int = 1) -> Tensor:
    """A weight `(O, I, ...)` as rows `(G, n)` that share a scale each.

    group  "tensor": one row; "channel": a row for each output channel; a number: rows of so many weights, the last
           one filled up with the last weight where the division leaves a rest
    axis   of a numbered group: 1 takes neighbours; 0 takes every G-th weight
    """
    if group == "tensor":
        return weight.reshape(1, -1)
    if group == "channel":
        return weight.flatten(1)
    size = int(group)
    flat = weight.flatten()
    rest = -flat.numel() % size
    if rest:
        flat = torch.cat([flat, flat[-1:].expand(rest)])
    return flat.view(-1, size) if axis == 1 else flat.view(size, -1).T


def from_groups(rows: Tensor, shape: torch.Size, group: int | str, axis: int = 1) -> Tensor:
    """The inverse of `to_groups`: the weight of `shape`."""
    flat = rows if isinstance(group, str) or axis == 1 else rows.T
    return flat.reshape(-1)[: shape.numel()].view(shape)


def grouped_shape(shape: torch.Size, group: int | str) -> tuple[int, int]:
    """The shape (G, n) that `to_groups` gives a weight of `shape`."""
    if isinstance(group, str):
        return (1, shape.numel()) if group == "tensor" else (shape[0], shape.numel() // shape[0])
    return math.ceil(shape.numel() / group), group


def along(values: Tensor, x: Tensor, dim: int) -> Tensor:
    """`values` `(n,)` in a shape that broadcasts with `x`, whose dimension `dim` has the size n."""
    shape = [1] * x.ndim
    shape[dim] = -1
    return values.view(shape)


def channel_dim(x: Tensor) -> int:
    """Where the input channels of a layer are: 1 of pictures `(B, C, H, W)`, the last of tokens `(B, ..., C)`."""
    return 1 if x.ndim == 4 else -1


def power_of_two(exponents: Tensor) -> Tensor:
    """2^k, exactly, for integers k in [-126, 127]: float32."""
    return ((exponents.to(torch.int32) + 127) << 23).view(torch.float32)
