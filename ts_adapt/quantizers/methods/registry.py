"""The methods by name, and names of whole settings: `hqq4`, `minmax-w8a8`, `minmax-w4a8+adaround`, `torchao-int8`.

FAMILY + BITS             hqq4, vqdm4: bits of the weights; bf16, fp16: the numbers that layers are run in
FAMILY-wBITS[aBITS]       minmax-w4, tdq-w4a8: bits of weights and activations
torchao-int8, torchao-fp8 the numbers that Linear layers are run in
... +OPTION               of `EXTRAS` and `OF_LAYERS`, as often as wanted
"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

from ts_adapt.errors import TsAdaptError, unknown
from ts_adapt.quantizers.layers.plan import LayerOptions
from ts_adapt.quantizers.methods.half import BF16, FP16
from ts_adapt.quantizers.methods.hqq import HQQ
from ts_adapt.quantizers.methods.minmax import MinMax
from ts_adapt.quantizers.methods.tdq import TDQ
from ts_adapt.quantizers.methods.tinydm import TinyDM
from ts_adapt.quantizers.methods.torchao import TorchAO
from ts_adapt.quantizers.methods.vqdm import VQDM
from ts_adapt.quantizers.quantization import Quantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "minmax": MinMax,
    "hqq": HQQ,
    "torchao": TorchAO,
    "tdq": TDQ,
    "tinydm": TinyDM,
    "vqdm": VQDM,
    "bf": BF16,
    "fp": FP16,
}
EXAMPLES = (
    "minmax-w8a8", "minmax-w4", "hqq4", "torchao-int8", "torchao-fp8", "tdq-w8a8", "tinydm-w8a8", "vqdm4",
    "bf16", "fp16",
)  # fmt: skip
"""Names, of each form there is."""
EXTRAS: dict[str, dict[str, Any]] = {
    "adaround": {"adaround": 300},
    "dynamic": {"dynamic": True},
    "mse": {"weight_range": "mse", "activation_range": "mse"},
    "weight-only": {"mode": "weight-only"},
    "qat": {"mode": "qat"},
    "tuned": {"fine_tune": 200},
    "plain-attention": {"attention": False},
}
"""What may stand behind a `+`, and the options that it sets."""
OF_LAYERS: dict[str, dict[str, Any]] = {"split": {"split_shortcuts": True}, "ptqd": {"correct": True}}
"""The same for options of the layers, behind any family."""

NAME = re.compile(r"(?P<family>[a-z]+)(-?(?P<weights>\d+)|-w(?P<bits>\d+)(a(?P<inputs>\d+))?|-(?P<numbers>int8|fp8))?")


def build(name: str, **options: Any) -> tuple[Quantizer, LayerOptions]:
    """The quantizer called `name`, and the options of the layers that go with it; `options` come on top of the name's.

    Raises TsAdaptError for an unknown family, suffix or option, and for bits that the family does not have.
    """
    base, *extras = name.split("+")
    match = NAME.fullmatch(base)
    if match is None or match["family"] not in QUANTIZERS or (match["numbers"] and match["family"] != "torchao"):
        raise unknown("quantizer", base, EXAMPLES)
    family, bits = match["family"], match["weights"] or match["bits"]
    settings: dict[str, Any] = {"bits": int(bits)} if bits else {}
    if match["inputs"]:
        settings["activation_bits"] = int(match["inputs"])
    if match["numbers"] == "fp8":
        settings["mode"] = "float8"
    layers = LayerOptions()
    for extra in extras:
        if extra in OF_LAYERS:
            layers = replace(layers, **OF_LAYERS[extra])
        elif extra in EXTRAS:
            settings |= EXTRAS[extra]
        else:
            raise unknown("suffix of a quantizer", extra, [*EXTRAS, *OF_LAYERS])
    if layers.correct and "qat" in extras:
        raise TsAdaptError(
            f"+ptqd measures a network as it is before +qat trains it; leave one of them out of {name!r}"
        )
    method = QUANTIZERS[family]
    known = [field.name for field in fields(method.Options)]
    for option in settings | options:
        if option not in known:
            raise TsAdaptError(f"{family} has no option {option!r}, asked for by {name!r}; it has {', '.join(known)}")
    try:
        return method(method.Options(**(settings | options))), layers
    except TsAdaptError as error:
        raise TsAdaptError(f"of the quantizer {name!r} {error}") from error
