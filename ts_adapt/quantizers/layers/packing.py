"""Numbers as they are kept: codes of b bits in bytes without a bit between them, real numbers of few bits.

    word = sum_j q_j 2^(b j),  j < lcm(b, 8) / b        lcm(b, 8) / 8 bytes a word, the lowest first
    x    = unit y,  unit = max |x|                      unit in float32, y in float16, which is too narrow for x itself

Two codes of 4 bits a byte, four of 2 bits, eight of 3 bits in three bytes. The last word is filled with zeros. Real
numbers are kept as integers of the same bits, which `network.to(dtype)` leaves as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """The bytes that `count` codes of `bits` bits take."""
    codes, width = _word(bits)
    return math.ceil(count / codes) * width


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integers `(n,)` in [0, 2^bits) -> their bytes `(packed_bytes(n, bits),)`, uint8."""
    each, width = _word(bits)
    rows = math.ceil(codes.numel() / each)
    padded = torch.zeros(rows * each, dtype=torch.int64, device=codes.device)
    padded[: codes.numel()] = codes.flatten().to(torch.int64)
    words = (padded.view(rows, each) << bits * _count(each, padded)).sum(-1, keepdim=True)
    return (words >> 8 * _count(width, padded) & 0xFF).to(torch.uint8).flatten()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes `(count,)` in the bytes that `pack` made: uint8, or int64 for more than 8 bits."""
    each, width = _word(bits)
    if bits == 8:
        return packed[:count]
    words = packed.view(-1, width)
    if width > 1:
        words = words.to(torch.int32 if width < 4 else torch.int64)
        words = (words << 8 * _count(width, words)).sum(-1, keepdim=True, dtype=words.dtype)
    codes: Tensor = (words >> bits * _count(each, words)) & (2**bits - 1)
    return codes.flatten()[:count].to(torch.uint8 if bits <= 8 else torch.int64)


def in_bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in the precision `dtype`, float16 or float32, as integers of the same bits; `view(dtype)` is the way back."""
    return x.detach().to(dtype).view(torch.int16 if dtype == torch.float16 else torch.int32)


def in_units(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest of |x| `()`, and `x` in its units in the precision `dtype`; both as `in_bits`."""
    unit = x.detach().abs().max().float()
    return in_bits(unit, torch.float32), in_bits(x.detach().float() / unit, dtype)


def from_units(unit: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `in_units`, up to its rounding: float32."""
    return x.view(dtype).float() * unit.view(torch.float32)


def _word(bits: int) -> tuple[int, int]:
    """How many codes a word has, and how many bytes."""
    length = math.lcm(bits, 8)
    return length // bits, length // 8


def _count(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, dtype=like.dtype, device=like.device)
