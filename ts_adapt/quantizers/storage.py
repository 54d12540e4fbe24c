"""A quantization on disk: a file with the tensors of what was replaced, and a config with the rest.

    config        format, version, the network's class and fingerprint, method, options, and for each replaced name the
                  kind of what stands there, from which it is made again before its tensors are read

What stays in full precision is not stored: it is the network's own, and the fingerprint tells another network. Nothing
is pickled. The files may be anybody's, so that it is looked at

    before a part is built   that every entry of its spec is known and has its type, and that no number asks for more
                             memory than the tensors of the file take themselves
    once it has its tensors  that weights are finite and have the layer's shape, inputs as many channels, every timestep
                             a quantizer
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ts_adapt.denoisers.network import CORRECTION
from ts_adapt.errors import TsAdaptError, one_line
from ts_adapt.quantizers.layers.activations import (
    DynamicActivation,
    GroupedActivation,
    StaticActivation,
    TableActivation,
    TimedActivation,
)
from ts_adapt.quantizers.layers.affine import check_bits, check_group
from ts_adapt.quantizers.layers.attention import TENSORS as OF_ATTENTION
from ts_adapt.quantizers.layers.attention import QuantizedAttention
from ts_adapt.quantizers.layers.codebooks import FORMATS, CodebookWeight
from ts_adapt.quantizers.layers.correction import OutputCorrection
from ts_adapt.quantizers.layers.half import HalfActivation, HalfWeight
from ts_adapt.quantizers.layers.plan import LayerOptions
from ts_adapt.quantizers.layers.quantized_layer import ActivationPart, Part, QuantizedLayer, SplitLayer, WeightPart
from ts_adapt.quantizers.layers.weights import AffineWeight, BalancedWeight, DenseWeight, LSQWeight, TorchAOWeight
from ts_adapt.quantizers.quantization import (
    Quantization,
    attribute,
    begin,
    fingerprint,
    is_quantized,
    quantization_of,
    size_of,
)
from ts_adapt.storage.files import Schema, is_finite, read_json, read_tensors, write_json, write_tensors
from ts_adapt.storage.layout import CONFIG, QUANTIZATION, TENSORS

CONFIG_SCHEMA: Schema = {
    "format": str, "version": int, "network": str, "fingerprint": str, "method": str, "options": dict, "layers": dict,
    "left": dict, "replaced": dict,
}  # fmt: skip
PARTS: dict[str, type[Part]] = {
    part.kind: part
    for part in (
        AffineWeight, BalancedWeight, CodebookWeight, DenseWeight, HalfWeight, LSQWeight, TorchAOWeight,
        StaticActivation, DynamicActivation, TimedActivation, TableActivation, GroupedActivation, HalfActivation,
        QuantizedAttention, OutputCorrection,
    )
}  # fmt: skip
"""kind -> part: what can be stored, in a layer or in the place of anything else."""

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


def save(network: nn.Module, folder: Path | str) -> None:
    """Write the quantization of `network` under `folder`, the config last; TsAdaptError if it is not quantized."""
    folder = Path(folder)
    of = quantization_of(network)
    specs: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, original in of.originals.items():
        new = attribute(network, name)
        if id(new) in seen:
            continue
        seen.add(id(new))
        specs[name] = _describe(new, original)
        tensors |= {f"{name}.{key}": value for key, value in _own_tensors(new).items()}
    write_tensors(folder / TENSORS, tensors)
    config = {
        **QUANTIZATION.head,
        "network": type(network).__name__,
        "fingerprint": of.fingerprint,
        "method": of.method,
        "options": of.options,
        "layers": asdict(of.layer_options),
        "size": asdict(size_of(network)),
        "left": of.left,
        "replaced": specs,
    }
    write_json(folder / CONFIG, config)


def load(network: nn.Module, folder: Path | str) -> nn.Module:
    """Put the quantization under `folder` on `network`, in place, and return it.

    Raises TsAdaptError when the network is quantized already or is another than the file's, and for files that are
    missing, damaged, or of another format.
    """
    folder = Path(folder)
    if is_quantized(network):
        raise TsAdaptError(f"{type(network).__name__} is quantized already; restore it before another is loaded")
    config = read_json(folder / CONFIG, CONFIG_SCHEMA)
    QUANTIZATION.check(config, folder / CONFIG, "quantize the network again")
    if config["fingerprint"] != fingerprint(network):
        raise TsAdaptError(
            f"{folder} holds the quantization of another {config['network']} than this {type(network).__name__}: "
            "architecture, weights or precision differ; load the network it was made for, or quantize this one"
        )
    tensors = read_tensors(folder / TENSORS)
    try:
        layers = LayerOptions(**{**config["layers"], "skip": tuple(config["layers"].get("skip", ()))})
        to = begin(network, config["method"], config["options"], layers)
        for name, reason in config["left"].items():
            to.leave(name, reason)
        for name, spec in config["replaced"].items():
            own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            original = None if name == CORRECTION else attribute(network, name)
            new = _rebuild(spec, original, to, max((v.numel() for v in own.values()), default=0))
            _fill(new, own)
            _check_built(new, original)
            to.correct(new) if isinstance(new, OutputCorrection) else to.replace(name, new)
    except BaseException as error:
        if is_quantized(network):
            quantization_of(network).undo()
        if not isinstance(error, TsAdaptError | AttributeError | LookupError | TypeError | ValueError | RuntimeError):
            raise
        raise TsAdaptError(
            f"{folder} holds no valid quantization ({one_line(error)}); quantize the network again"
        ) from error
    return network


def _describe(new: Any, original: Any) -> dict[str, Any]:
    """JSON from which `_rebuild` makes a module like `new`, up to its tensors."""
    if isinstance(new, QuantizedLayer):
        activation = None if new.activation is None else _part_spec(new.activation)
        return {"kind": "layer", "weight": _part_spec(new.stored), "activation": activation}
    if isinstance(new, SplitLayer):
        return {"kind": "split", "at": new.channels[0]}
    if isinstance(new, Part):
        return {"kind": "part", "part": _part_spec(new)}
    if type(new) is type(original) and isinstance(new, nn.Module):
        return {"kind": "tensors"}
    raise TsAdaptError(f"a {type(new).__name__} cannot be stored; quantize by another method")


def _own_tensors(new: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of `new` that are stored: none of a split layer's parts, none that the original gives."""
    if isinstance(new, SplitLayer):
        return {}
    derived = [f"{name}." for name, part in new.named_modules() if isinstance(part, Part) and part.derived]
    return {k: v for k, v in new.state_dict().items() if not k.startswith(tuple(derived))}


def _fill(new: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Read the tensors of `new`; RuntimeError unless they are all there and fit."""
    wanted = _own_tensors(new)
    if wanted:
        missing = new.load_state_dict(tensors, strict=False)
        lacking = wanted.keys() & set(missing.missing_keys)
        if lacking:
            raise RuntimeError(f"the tensors {', '.join(sorted(lacking))} are missing")


def _part_spec(part: Part) -> dict[str, Any]:
    return {"kind": part.kind, **part.spec()}


def _rebuild(spec: dict[str, Any], original: Any, to: Quantization, stored: int) -> nn.Module:
    """A module like the one that `_describe` saw, for which the file has tensors of at most `stored` values."""
    kind = spec["kind"]
    if kind in ("layer", "split") and not isinstance(original, nn.Linear | nn.Conv2d):
        raise ValueError(f"a {type(original).__name__} is no layer that is quantized")
    if kind == "layer":
        weight = _part(spec["weight"], original, to, stored)
        activation = None if spec["activation"] is None else _part(spec["activation"], original, to, stored)
        if not isinstance(weight, WeightPart) or not isinstance(activation, ActivationPart | None):
            raise ValueError(f"{spec['weight']['kind']} is no weight, or what stands before it no activation")
        return QuantizedLayer(original, weight, activation)
    if kind == "split":
        if not 0 < spec["at"] < original.weight.shape[1]:
            raise ValueError(f"a layer of {original.weight.shape[1]} channels is not split at {spec['at']}")
        return SplitLayer(original, spec["at"])
    if kind == "part":
        part = _part(spec["part"], original, to, stored)
        if not isinstance(part, QuantizedAttention if original is not None else OutputCorrection):
            raise ValueError(f"{part.kind} stands in no place of its own")
        return part
    if kind == "tensors":
        return copy.deepcopy(original)  # type: ignore[no-any-return]
    raise ValueError(f"{kind!r} is no kind of replacement")


def _part(spec: dict[str, Any], original: Any, to: Quantization, stored: int) -> Part:
    _check_spec(spec, stored)
    options = dict(spec)
    cls = PARTS[options.pop("kind")]
    weight = getattr(original, "weight", None)
    device = (weight if isinstance(weight, torch.Tensor) else next(to.network.parameters())).device
    return cls.from_spec(options, original, to.listener if cls.timed else None).to(device)


def _check_spec(spec: Any, stored: int) -> None:
    """ValueError unless a part can be built from `spec`, of which the file has tensors of `stored` values."""
    _check_types(spec, SPEC, max(stored, SMALL))
    if "bits" in spec:
        check_bits(spec["bits"])
    if "group" in spec:
        check_group(spec["group"])
    if spec.get("kind") == OutputCorrection.kind and spec["times"] * spec["channels"] > stored:
        raise ValueError(f"there are no numbers for {spec['channels']} channels at {spec['times']} timesteps")
    if "embedding" in spec:
        _check_types(spec["embedding"], EMBEDDING, max(stored, SMALL))
    if "layout" in spec and tuple(spec["layout"]) not in FORMATS.get(spec.get("bits"), ()):
        raise ValueError(f"{spec['layout']} is no format of codebooks")
    if "parts" in spec and spec["parts"].keys() != set(OF_ATTENTION):
        raise ValueError(f"attention has parts for {', '.join(OF_ATTENTION)}")
    for part in spec.get("parts", {}).values():
        _check_spec(part, stored)


def _check_built(new: nn.Module, original: Any) -> None:
    """ValueError unless `new`, which has its tensors, can stand for `original`."""
    if isinstance(new, QuantizedAttention) and not callable(original):
        raise ValueError(f"a {type(original).__name__} is no processor of an attention")
    for part in new.modules():
        if isinstance(part, QuantizedLayer) and not part.stored.derived:
            weight = part.stored.dense()
            if weight.shape != original.weight.shape or not is_finite(part.stored()) or not is_finite(weight):
                raise ValueError(f"the weight of a layer has the shape {tuple(weight.shape)}, or is not finite")
        elif isinstance(part, OutputCorrection) and not (len(part.times) and bool((part.gain > 0).all())):
            raise ValueError("there is nothing to correct by")
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
