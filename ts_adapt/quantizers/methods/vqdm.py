"""VQDM (Egiazarian et al. 2024, for diffusion models): weights as sums of vectors from additive codebooks, calibrated.

Blocks of the network are quantized one after the other, each for the inputs that it gets from those before it as they
are by then. A layer's format depends on its size (`choose_format`), as codebooks are paid for once a layer. With
G = E x^T x of the layer's inputs (`layer_inputs`), its codes, codebooks and scales (`layers.codebooks`) are chosen for
the error of the output,

    tr(D G D^T) / tr(W G W^T),      D = W - W^

by residual k-means, and then in turn: Adam on codebooks and scales; beam search over the codes of one group after the
other, all rows at once, with the errors of the other groups in view (AQLM, Egiazarian et al. 2024). At the end
codebooks and scales may be fine-tuned to what the network in full precision said to the calibration set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated

import torch
from torch import Tensor, nn

from ts_adapt.errors import TsAdaptError
from ts_adapt.options import MANY, Between, Count, check_options
from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.calibration.layer_inputs import Recorder, observe, second_moments
from ts_adapt.quantizers.layers.codebooks import FORMATS, CodebookWeight, Codes, Format, LearnedCodebooks, looked_up
from ts_adapt.quantizers.layers.quantized_layer import Layer, QuantizedLayer
from ts_adapt.quantizers.quantization import Quantization, Quantizer, quantized_layers
from ts_adapt.quantizers.training import Batches, FineTuneOptions, fine_tune, reproduction_batches, reproduction_loss

KMEANS_STEPS = 10
BETAS = (0.0, 0.95)
LEAST_GAIN = 0.01
DAMPING = 1e-4


@dataclass
class VQDMOptions:
    """Bits, and how long is searched. Raises TsAdaptError for what makes no sense, naming it."""

    bits: int = 4
    """Of the codes of a weight: 2, 3 or 4."""
    overhead: float = 0.25
    """Bits a weight that the codebooks of a layer may add; a layer too small for any takes the cheapest."""
    rounds: Annotated[int, Between(0, MANY)] = 4
    """Of Adam and beam search for a layer, at most."""
    steps: Count = 100
    """Of Adam in a round."""
    lr: float = 1e-4
    beam: Count = 8
    fine_tune: Annotated[int, Between(0, MANY)] = 0
    """Steps of fine-tuning to the network in full precision."""
    fine_tune_lr: float = 1e-6
    fine_tune_batch: Count = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits not in FORMATS:
            raise TsAdaptError(f"bits is {self.bits!r}; vqdm has codebooks for {', '.join(map(str, FORMATS))}")
        check_options(self, "vqdm.")


class VQDM(Quantizer):
    """See the module's head."""

    name = "vqdm"
    Options = VQDMOptions
    options: VQDMOptions
    needs_calls = True

    def apply(self, to: Quantization, calls: Sequence[Call]) -> None:
        o = self.options
        layers = _in_order_of_calls(to.network, to.layers(), calls)
        for name in [name for name, layer in layers.items() if isinstance(layer, nn.Conv2d) and layer.groups > 1]:
            to.leave(name, "grouped convolution, which vqdm does not take")
            del layers[name]
        batches = reproduction_batches(to.network, calls, o.fine_tune_batch, o.seed) if o.fine_tune else None
        for _, names in groupby(layers, key=block_of):
            block = {name: layers[name] for name in names}
            moments = second_moments(to.network, block, calls)
            for name, layer in block.items():
                layout = choose_format(layer.weight.shape, o.bits, o.overhead)
                found = find_codes(layer.weight, moments[name][0], layout, o)
                to.replace(name, QuantizedLayer(layer, CodebookWeight.of(found, layer.weight.shape, layout, o.bits)))
        if batches is not None:
            self._fine_tune(to.network, batches)

    def _fine_tune(self, network: nn.Module, batches: Batches) -> None:
        o = self.options
        for _, layer in quantized_layers(network):
            if isinstance(layer.stored, CodebookWeight):
                layer.stored = LearnedCodebooks(layer.stored)
        options = FineTuneOptions(steps=o.fine_tune, lr=o.fine_tune_lr, train="weights", seed=o.seed)
        fine_tune(network, batches, reproduction_loss, options, progress=False)
        for _, layer in quantized_layers(network):
            if isinstance(layer.stored, LearnedCodebooks):
                layer.stored = layer.stored.learned()


def _in_order_of_calls(network: nn.Module, layers: dict[str, Layer], calls: Sequence[Call]) -> dict[str, Layer]:
    recorder = Recorder(keep=1)
    observe(network, layers, [calls[0].rows(torch.arange(1))], recorder.visit)
    recorder.records(layers)
    return {name: layers[name] for name in recorder.seen}


def block_of(name: str) -> str:
    """The block that a layer is in: `down_blocks.0` of `down_blocks.0.resnets.1.conv1`, `mid_block`."""
    first, _, rest = name.partition(".")
    second = rest.partition(".")[0]
    return f"{first}.{second}" if second.isdigit() else first


def choose_format(shape: torch.Size, bits: int, overhead: float) -> Format:
    """The most expressive format whose codebooks cost a layer of `shape` at most `overhead` bits a weight, else the
    cheapest."""
    return next((f for f in FORMATS[bits] if f.overhead(shape) <= overhead), FORMATS[bits][-1])


def find_codes(weight: Tensor, moment: Tensor, layout: Format, options: VQDMOptions) -> Codes:
    """Codes, codebooks and scales for `weight` `(O, ...)`, whose inputs have the second `moment` `(K, K)`.

    The rounds of Adam and beam search end when one gains less than 1 %.
    """
    rows = weight.detach().float().flatten(1)
    missing = -rows.shape[1] % layout.group
    rows = nn.functional.pad(rows, (0, missing))
    mean = moment.diagonal().mean().clamp(min=1e-30)
    scaled = (moment / mean).float() + DAMPING * torch.eye(len(moment), device=rows.device)
    moment = nn.functional.pad(scaled, (0, missing, 0, missing))
    found = residual_kmeans(rows, layout, options.seed)
    error = output_share(rows, found, moment)
    for _ in range(options.rounds):
        _polish(rows, found, moment, options.steps, options.lr)
        beam_search(rows, found, moment, options.beam)
        former, error = error, output_share(rows, found, moment)
        if float(error) > (1 - LEAST_GAIN) * float(former):
            break
    return found


def output_share(rows: Tensor, found: Codes, moment: Tensor) -> Tensor:
    """tr(D G D^T) / tr(W G W^T)."""
    difference = rows - found.rows()
    return ((difference @ moment) * difference).sum() / ((rows @ moment) * rows).sum().clamp(min=1e-30)


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


def beam_search(rows: Tensor, found: Codes, moment: Tensor, beam: int) -> None:
    """Choose the codes of each group anew, in place; the error never rises.

    For one group of columns b the error is, up to a constant, s^2 (v G_bb v - 2 v h), v the sum of codebook vectors,
    h = ((D G)_b / s + v_now G_bb). Codebooks are gone through one by one, keeping the `beam` best choices so far.
    """
    group, scale = found.books.shape[2], found.scale
    residual = (rows - found.rows()) @ moment
    every = torch.arange(rows.shape[0], device=rows.device)[:, None]
    for j in range(found.codes.shape[1]):
        block = slice(j * group, (j + 1) * group)
        own = moment[block, block]
        now = looked_up(found.books, found.codes[:, j])
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
        residual = residual - scale * (sums[:, 0] - now) @ moment[block]


def _polish(rows: Tensor, found: Codes, moment: Tensor, steps: int, lr: float) -> None:
    """Adam on codebooks and scales; what is best on the way is kept."""
    books = found.books.clone().requires_grad_()
    stretch = torch.zeros_like(found.scale, requires_grad=True)
    start = found.scale
    optimizer = torch.optim.Adam([books, stretch], lr=lr, betas=BETAS)
    least = float(output_share(rows, found, moment))
    with torch.enable_grad():
        for _ in range(steps):
            tried = Codes(found.codes, books, start * stretch.exp())
            loss = output_share(rows, tried, moment)
            if float(loss.detach()) < least:
                least = float(loss.detach())
                found.books, found.scale = books.detach().clone(), tried.scale.detach()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


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
