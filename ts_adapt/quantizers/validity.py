"""Whether what a file says of a quantization can be built and run; the file may be anybody's.

    before a part is built   every entry of its spec is known and has its type; no number asks for more memory than the
                             tensors of the file take themselves
    once it has its tensors  weights are finite and have the layer's shape, inputs as many channels, every timestep a
                             quantizer

ValueError says what is wrong; `storage.load` names the file.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ts_adapt.files import is_finite
from ts_adapt.quantizers.affine import check_bits, check_group
from ts_adapt.quantizers.attention import TENSORS, QuantizedAttention
from ts_adapt.quantizers.codebooks import FORMATS
from ts_adapt.quantizers.grouped import GroupedActivation
from ts_adapt.quantizers.layer import QuantizedLayer

SMALL = 2**16
"""A number that is never too large, however small the file is."""

SPEC: dict[str, type | tuple[type, ...]] = {
    "kind": str, "bits": int, "group": (int, str), "axis": int, "symmetric": bool, "dtype": str, "mode": str,
    "offset": (float, int, type(None)), "embedding": dict, "count": int, "layout": list, "channels": (int, type(None)),
    "folded": bool, "times": int, "groups": int, "parts": dict,
}  # fmt: skip
"""What a spec may hold, and of which type."""
EMBEDDING: dict[str, type | tuple[type, ...]] = {
    "num_channels": int, "flip_sin_to_cos": bool, "downscale_freq_shift": (float, int), "scale": (float, int),
}  # fmt: skip


def check_spec(spec: Any, stored: int) -> None:
    """ValueError unless a part can be built from `spec`, of which the file has tensors of `stored` values."""
    _check_types(spec, SPEC, max(stored, SMALL))
    if "bits" in spec:
        check_bits(spec["bits"])
    if "group" in spec:
        check_group(spec["group"])
    if "embedding" in spec:
        _check_types(spec["embedding"], EMBEDDING, max(stored, SMALL))
    if "layout" in spec and tuple(spec["layout"]) not in FORMATS.get(spec.get("bits"), ()):
        raise ValueError(f"{spec['layout']} is no format of codebooks")
    if "parts" in spec and spec["parts"].keys() != set(TENSORS):
        raise ValueError(f"attention has parts for {', '.join(TENSORS)}")
    for part in spec.get("parts", {}).values():
        check_spec(part, stored)


def check_built(new: nn.Module, original: Any) -> None:
    """ValueError unless `new`, which has its tensors, can stand for `original`."""
    if isinstance(new, QuantizedAttention) and not callable(original):
        raise ValueError(f"a {type(original).__name__} is no processor of an attention")
    for part in new.modules():
        if isinstance(part, QuantizedLayer) and not part.stored.derived:
            weight = part.stored.dense()
            if weight.shape != original.weight.shape or not is_finite(part.stored()) or not is_finite(weight):
                raise ValueError(f"the weight of a layer has the shape {tuple(weight.shape)}, or is not finite")
        elif isinstance(part, GroupedActivation):
            wanted = original.weight.shape[1] if isinstance(new, QuantizedLayer) else None
            if not len(part.times) or int(part.group.max()) >= len(part.scale):
                raise ValueError("there is a timestep without a quantizer")
            if part.exponents is not None and len(part.exponents) != wanted:
                raise ValueError(f"there are exponents for {len(part.exponents)} channels")


def _check_types(value: Any, types: dict[str, type | tuple[type, ...]], most: int) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} describes no part")
    for name, entry in value.items():
        if name not in types or not isinstance(entry, types[name]):
            raise ValueError(f"{name!r} is a {type(entry).__name__}, or not known")
        if isinstance(entry, bool) and types[name] is not bool:
            raise ValueError(f"{name!r} is a bool")
        if isinstance(entry, int) and not 0 <= entry <= most:
            raise ValueError(f"{name!r} is {entry}, more than the file has")
