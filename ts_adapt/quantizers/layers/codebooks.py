"""Additive codebooks (AQLM, Egiazarian et al. 2024): a weight as a sum of vectors from M lists.

    W^[o, j g : (j + 1) g] = s_o sum_m C_m[q_ojm]          C_m `(2^k, g)`, q_ojm < 2^k

    M k / g        bits of codes a weight
    16 M 2^k g     bits of the codebooks of a layer, shared by its weights
    16 / K         bits a weight of the row scales s_o, K weights a row

The weight of a convolution is flattened; a last incomplete group is filled up with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ts_adapt.quantizers.layers.packing import from_units, in_bits, in_units, pack, packed_bytes, unpack
from ts_adapt.quantizers.layers.quantized_layer import WeightPart
from ts_adapt.quantizers.layers.timestep import TimestepListener


class Format(NamedTuple):
    """books  M codebooks; code_bits  k; group  g weights that share a code of each"""

    books: int
    code_bits: int
    group: int

    def overhead(self, shape: torch.Size) -> float:
        """Bits of codebooks a weight of a layer of `shape`."""
        return 16 * self.books * self.group * 2.0**self.code_bits / shape.numel()


FORMATS: dict[int, tuple[Format, ...]] = {
    2: (Format(2, 8, 8), Format(1, 8, 4), Format(1, 4, 2), Format(1, 2, 1)),
    3: (Format(3, 8, 8), Format(1, 6, 2), Format(1, 3, 1)),
    4: (Format(4, 8, 8), Format(2, 8, 4), Format(1, 8, 2), Format(1, 4, 1)),
}
"""bits -> formats of so many bits of codes a weight, the most expressive and the largest codebooks first."""


@dataclass
class Codes:
    """codes `(O, J, M)` integers, books `(M, 2^k, g)`, scale `(O, 1)`."""

    codes: Tensor
    books: Tensor
    scale: Tensor

    def rows(self) -> Tensor:
        """W^ `(O, J g)`, differentiable in books and scale."""
        return self.scale * looked_up(self.books, self.codes).flatten(1)


class CodebookWeight(WeightPart):
    """Packed codes; codebooks and scales as float16, kept as integers of 16 bits."""

    kind = "codebook"
    codes: Tensor
    books: Tensor
    scale: Tensor
    unit: Tensor

    def __init__(self, shape: torch.Size, layout: Format, bits: int) -> None:
        super().__init__()
        self.shape, self.layout, self.bits = shape, layout, bits
        count, code_bits, group = layout
        self.groups = -(-shape[1:].numel() // group)
        size = packed_bytes(shape[0] * self.groups * count, code_bits)
        self.register_buffer("codes", torch.zeros(size, dtype=torch.uint8))
        self.register_buffer("books", torch.zeros(count, 2**code_bits, group, dtype=torch.int16))
        self.register_buffer("scale", torch.zeros(shape[0], 1, dtype=torch.int16))
        self.register_buffer("unit", torch.zeros((), dtype=torch.int32))

    @classmethod
    def of(cls, found: Codes, shape: torch.Size, layout: Format, bits: int) -> Self:
        part = cls(shape, layout, bits).to(found.scale.device)
        unit, scale = in_units(found.scale, torch.float16)
        part.codes.copy_(pack(found.codes.flatten(), layout.code_bits))
        part.books.copy_(in_bits(found.books, torch.float16))
        part.scale.copy_(scale)
        part.unit.copy_(unit)
        return part

    def read(self) -> Codes:
        count, code_bits, _ = self.layout
        codes = unpack(self.codes, code_bits, self.shape[0] * self.groups * count)
        scale = from_units(self.unit, self.scale, torch.float16)
        books = self.books.view(torch.float16).float()
        return Codes(codes.view(self.shape[0], self.groups, count).long(), books, scale)

    def forward(self) -> Tensor:
        return self.read().rows()[:, : self.shape[1:].numel()].view(self.shape)

    def spec(self) -> dict[str, Any]:
        return {"layout": list(self.layout), "bits": self.bits}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, listener: TimestepListener | None) -> Self:
        return cls(original.weight.shape, Format(*spec["layout"]), spec["bits"])


class LearnedCodebooks(WeightPart):
    """A `CodebookWeight` while its codebooks and scales are trained, as float32; its codes stay. It is not stored."""

    kind = "codebook in training"

    def __init__(self, part: CodebookWeight) -> None:
        super().__init__()
        self.part, self.bits = part, part.bits
        found = part.read()
        self.books = nn.Parameter(found.books, requires_grad=False)
        self.scale = nn.Parameter(found.scale, requires_grad=False)

    def forward(self) -> Tensor:
        rows = Codes(self.part.read().codes, self.books, self.scale).rows()
        return rows[:, : self.part.shape[1:].numel()].view(self.part.shape)

    def learned(self) -> CodebookWeight:
        part = self.part
        return CodebookWeight.of(Codes(part.read().codes, self.books, self.scale), part.shape, part.layout, part.bits)


def looked_up(books: Tensor, codes: Tensor) -> Tensor:
    """sum_m C_m[q_m] `(..., g)` for codes `(..., M)`."""
    return torch.stack([book[codes[..., m]] for m, book in enumerate(books)]).sum(0)
