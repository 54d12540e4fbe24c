"""Additive codebooks (AQLM, Egiazarian et al. 2024): a weight as a sum of vectors from M lists.

    W^[o, j g : (j + 1) g] = s_o sum_m C_m[q_ojm]          C_m `(2^k, g)`, q_ojm < 2^k

    M k / g        bits of codes a weight
    16 M 2^k g     bits of the codebooks of a layer, shared by its weights
    16 / K         bits a weight of the row scales s_o, K weights a row

The weight of a convolution is flattened; a last incomplete group is filled up with zeros. With G = E x^T x of the
layer's inputs (`gram`), codes, codebooks and scales are chosen for the error of the output,

    tr(D G D^T) / tr(W G W^T),      D = W - W^

by residual k-means, and then in turn: Adam on codebooks and scales; beam search over the codes of one group after the
other, all rows at once, with the errors of the other groups in view.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ts_adapt.quantizers.clock import Clock
from ts_adapt.quantizers.packing import pack, packed_bytes, unpack
from ts_adapt.quantizers.parts import WeightPart

KMEANS_STEPS = 10
BETAS = (0.0, 0.95)
LEAST_GAIN = 0.01
DAMPING = 1e-4


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
        return self.scale * _looked_up(self.books, self.codes).flatten(1)


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
        unit = found.scale.detach().abs().max().float()
        part.codes.copy_(pack(found.codes.flatten(), layout.code_bits))
        part.books.copy_(found.books.detach().half().view(torch.int16))
        part.scale.copy_((found.scale.detach().float() / unit).half().view(torch.int16))
        part.unit.copy_(unit.view(torch.int32))
        return part

    def read(self) -> Codes:
        count, code_bits, _ = self.layout
        codes = unpack(self.codes, code_bits, self.shape[0] * self.groups * count)
        scale = self.scale.view(torch.float16).float() * self.unit.view(torch.float32)
        books = self.books.view(torch.float16).float()
        return Codes(codes.view(self.shape[0], self.groups, count).long(), books, scale)

    def forward(self) -> Tensor:
        return self.read().rows()[:, : self.shape[1:].numel()].view(self.shape)

    def spec(self) -> dict[str, Any]:
        return {"layout": list(self.layout), "bits": self.bits}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, clock: Clock | None) -> Self:
        return cls(original.weight.shape, Format(*spec["layout"]), spec["bits"])


class LearnedCodebooks(WeightPart):
    """A `CodebookWeight` while its codebooks and scales are trained, as float32; its codes stay."""

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

    def spec(self) -> dict[str, Any]:
        return self.part.spec()

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: Any, clock: Clock | None) -> Self:
        return cls(CodebookWeight.from_spec(spec, original, clock))


def choose_format(shape: torch.Size, bits: int, overhead: float) -> Format:
    """The most expressive format whose codebooks cost a layer of `shape` at most `overhead` bits a weight, else the
    cheapest."""
    return next((f for f in FORMATS[bits] if f.overhead(shape) <= overhead), FORMATS[bits][-1])


def find_codes(
    weight: Tensor, gram: Tensor, layout: Format, *, rounds: int, steps: int, lr: float, beam: int, seed: int
) -> Codes:
    """Codes, codebooks and scales for `weight` `(O, ...)` with inputs of `gram` `(K, K)`; see the module's head.

    At most `rounds` rounds of `steps` steps of Adam and a beam search; they end when one gains less than 1 %.
    """
    rows = weight.detach().float().flatten(1)
    missing = -rows.shape[1] % layout.group
    rows = nn.functional.pad(rows, (0, missing))
    mean = gram.diagonal().mean().clamp(min=1e-30)
    scaled = (gram / mean).float() + DAMPING * torch.eye(len(gram), device=rows.device)
    gram = nn.functional.pad(scaled, (0, missing, 0, missing))
    found = residual_kmeans(rows, layout, seed)
    error = output_share(rows, found, gram)
    for _ in range(rounds):
        _polish(rows, found, gram, steps, lr)
        beam_search(rows, found, gram, beam)
        former, error = error, output_share(rows, found, gram)
        if float(error) > (1 - LEAST_GAIN) * float(former):
            break
    return found


def output_share(rows: Tensor, found: Codes, gram: Tensor) -> Tensor:
    """tr(D G D^T) / tr(W G W^T)."""
    difference = rows - found.rows()
    return ((difference @ gram) * difference).sum() / ((rows @ gram) * rows).sum().clamp(min=1e-30)


def residual_kmeans(rows: Tensor, layout: Format, seed: int) -> Codes:
    """The m-th codebook holds the k-means centres of what the ones before it leave of the rows, each of unit size."""
    count, code_bits, group = layout
    scale = rows.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
    rest = (rows / scale).view(-1, group)
    generator = torch.Generator().manual_seed(seed)
    books, codes = [], []
    for _ in range(count):
        centres, nearest = _kmeans(rest, 2**code_bits, generator)
        rest = rest - centres[nearest]
        books.append(centres)
        codes.append(nearest)
    return Codes(torch.stack(codes, 1).view(rows.shape[0], -1, count), torch.stack(books), scale)


def beam_search(rows: Tensor, found: Codes, gram: Tensor, beam: int) -> None:
    """Choose the codes of each group anew, in place; the error never rises.

    For one group of columns b the error is, up to a constant, s^2 (v G_bb v - 2 v h), v the sum of codebook vectors,
    h = ((D G)_b / s + v_now G_bb). Codebooks are gone through one by one, keeping the `beam` best choices so far.
    """
    group, scale = found.books.shape[2], found.scale
    residual = (rows - found.rows()) @ gram
    every = torch.arange(rows.shape[0], device=rows.device)[:, None]
    for j in range(found.codes.shape[1]):
        block = slice(j * group, (j + 1) * group)
        own = gram[block, block]
        now = _looked_up(found.books, found.codes[:, j])
        h = (residual[:, block] / scale + now @ own)[:, None]
        codes, sums = found.codes[:, j][:, None], now[:, None]
        for m, book in enumerate(found.books):
            partial = sums - book[codes[..., m]]
            weighted = partial @ own
            fixed = (partial * (weighted - 2 * h)).sum(-1, keepdim=True)
            cost = fixed + ((book @ own) * book).sum(-1) + 2 * (weighted - h) @ book.T
            best = cost.flatten(1).topk(min(beam, cost[0].numel()), largest=False).indices
            origin, code = best // len(book), best % len(book)
            codes = codes[every, origin].clone()
            codes[..., m] = code
            sums = partial[every, origin] + book[code]
        found.codes[:, j] = codes[:, 0]
        residual = residual - scale * (sums[:, 0] - now) @ gram[block]


def _polish(rows: Tensor, found: Codes, gram: Tensor, steps: int, lr: float) -> None:
    """Adam on codebooks and scales; what is best on the way is kept."""
    books = found.books.clone().requires_grad_()
    stretch = torch.zeros_like(found.scale, requires_grad=True)
    start = found.scale
    optimizer = torch.optim.Adam([books, stretch], lr=lr, betas=BETAS)
    least = float(output_share(rows, found, gram))
    with torch.enable_grad():
        for _ in range(steps):
            tried = Codes(found.codes, books, start * stretch.exp())
            loss = output_share(rows, tried, gram)
            if float(loss.detach()) < least:
                least = float(loss.detach())
                found.books, found.scale = books.detach().clone(), tried.scale.detach()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _looked_up(books: Tensor, codes: Tensor) -> Tensor:
    """sum_m C_m[q_m] `(..., g)` for codes `(..., M)`."""
    return torch.stack([book[codes[..., m]] for m, book in enumerate(books)]).sum(0)


def _kmeans(x: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` centres of `x` `(n, g)` and the nearest of each."""
    start = torch.randperm(len(x), generator=generator)[:count].to(x.device)
    centres = x[start][torch.arange(count, device=x.device) % len(start)]
    nearest = torch.cdist(x, centres).argmin(1)
    for _ in range(KMEANS_STEPS):
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        nearest = torch.cdist(x, centres).argmin(1)
    return centres, nearest
