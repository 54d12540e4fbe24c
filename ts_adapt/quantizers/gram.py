"""X^T X of the inputs of a layer: what the error of its weights does to its output.

    E ||x (W - W^)^T||^2 = tr(D G D^T),  D = W - W^,  G = E x^T x

W is the layer's weight as a matrix `(O, K)`; x are the rows that it multiplies: tokens of a Linear, the unfolded
patches of a Conv2d, K = I h w, of one group of channels each. Means in float64, so that no order of batches matters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ts_adapt.quantizers.calibration import observe
from ts_adapt.quantizers.calls import Call
from ts_adapt.quantizers.traversal import Layer


def grams(network: nn.Module, layers: dict[str, Layer], calls: Sequence[Call]) -> dict[str, Tensor]:
    """G of each of `layers`, by name: `(groups, K, K)` float64; layers that no call reaches are left out.

    The inputs are those that arrive in `network` as it is; `layers` say how they are unfolded.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def visit(name: str, x: Tensor, timestep: Tensor) -> None:
        matrix = input_rows(layers[name], x).double()
        sums[name] = sums.get(name, torch.zeros(())).to(matrix) + matrix.transpose(1, 2) @ matrix
        rows[name] = rows.get(name, 0) + matrix.shape[1]

    observe(network, layers, calls, visit)
    return {name: total / rows[name] for name, total in sums.items()}


def input_rows(layer: Layer, x: Tensor) -> Tensor:
    """The rows that the weight of `layer` multiplies, `(groups, n, K)`."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, list(layer._reversed_padding_repeated_twice), mode=mode)
    patches = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    split = patches.view(x.shape[0], layer.groups, -1, patches.shape[-1])
    return split.permute(1, 0, 3, 2).flatten(1, 2)


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """tr(D G D^T) / O: the mean squared error of an output, for D of the shape of the layer's weight."""
    groups = gram.shape[0]
    rows = difference.flatten(1).to(gram.dtype).view(groups, -1, gram.shape[-1])
    return ((rows @ gram) * rows).sum() / difference.shape[0]
