"""A quantization on disk: `model.safetensors` with the tensors of what was replaced, `config.json` with the rest.

    config.json   format, version, the network's class and fingerprint, method, options, and for each replaced name the
                  kind of what stands there, from which it is made again before its tensors are read

What stays in full precision is not stored: it is the network's own, and the fingerprint tells another network. Nothing
is pickled.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ts_adapt.files import read_json, read_tensors, write_json, write_tensors
from ts_adapt.interfaces import TsAdaptError, one_line
from ts_adapt.quantizers.attention import QuantizedAttention
from ts_adapt.quantizers.codebooks import CodebookWeight
from ts_adapt.quantizers.grouped import GroupedActivation
from ts_adapt.quantizers.layer import QuantizedLayer, SplitLayer
from ts_adapt.quantizers.network import Quantization, begin, fingerprint, is_quantized, quantization_of, size_of
from ts_adapt.quantizers.parts import (
    ActivationPart,
    AffineWeight,
    DenseWeight,
    DynamicActivation,
    Part,
    StaticActivation,
    WeightPart,
)
from ts_adapt.quantizers.tdq import LSQWeight
from ts_adapt.quantizers.time_scale import TableActivation, TimedActivation
from ts_adapt.quantizers.tinydm import BalancedWeight
from ts_adapt.quantizers.torchao import TorchAOWeight
from ts_adapt.quantizers.traversal import LayerOptions
from ts_adapt.quantizers.validity import check_built, check_spec

FORMAT, VERSION = "ts_adapt-quantization", 1
CONFIG, TENSORS = "config.json", "model.safetensors"
PARTS: dict[str, type[Part]] = {
    "affine": AffineWeight,
    "dense": DenseWeight,
    "static": StaticActivation,
    "dynamic": DynamicActivation,
    "torchao": TorchAOWeight,
    "lsq": LSQWeight,
    "timed": TimedActivation,
    "table": TableActivation,
    "balanced": BalancedWeight,
    "codebook": CodebookWeight,
    "grouped": GroupedActivation,
    "attention": QuantizedAttention,
}
"""kind -> part: what can be stored, in a layer or in the place of anything else."""


def save(network: nn.Module, folder: Path | str) -> None:
    """Write the quantization of `network` under `folder`, the config last; TsAdaptError if it is not quantized."""
    folder = Path(folder)
    of = quantization_of(network)
    specs: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[int, str] = {}
    for name, original in of.originals.items():
        new = _at(network, name)
        if id(new) in seen:
            continue
        seen[id(new)] = name
        specs[name] = _describe(new, original)
        tensors |= {f"{name}.{key}": value for key, value in _own_tensors(new).items()}
    write_tensors(folder / TENSORS, tensors)
    config = {
        "format": FORMAT,
        "version": VERSION,
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
    config = read_json(
        folder / CONFIG,
        {"format": str, "version": int, "network": str, "fingerprint": str, "method": str, "options": dict,
         "layers": dict, "left": dict, "replaced": dict},
    )  # fmt: skip
    if config["format"] != FORMAT or config["version"] != VERSION:
        raise TsAdaptError(
            f"{folder / CONFIG} is of the format {config['format']!r}, version {config['version']}; expected "
            f"{FORMAT!r}, version {VERSION}; quantize the network again"
        )
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
            original = _at(network, name)
            new = _rebuild(spec, original, to, max((v.numel() for v in own.values()), default=0))
            _fill(new, own)
            check_built(new, original)
            to.replace(name, new)
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
        if not isinstance(part, QuantizedAttention):
            raise ValueError(f"{part.kind} stands in no place of its own")
        return part
    if kind == "tensors":
        return copy.deepcopy(original)  # type: ignore[no-any-return]
    raise ValueError(f"{kind!r} is no kind of replacement")


def _part(spec: dict[str, Any], original: Any, to: Quantization, stored: int) -> Part:
    check_spec(spec, stored)
    options = dict(spec)
    cls = PARTS[options.pop("kind")]
    weight = getattr(original, "weight", None)
    device = (weight if isinstance(weight, torch.Tensor) else next(to.network.parameters())).device
    return cls.from_spec(options, original, to.clock if cls.timed else None).to(device)


def _at(network: nn.Module, name: str) -> Any:
    parent, _, last = name.rpartition(".")
    return getattr(network.get_submodule(parent), last)
