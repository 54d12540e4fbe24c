"""A network with its layers quantized, and taken back to what it was.

    quantize(network, method, calls)   plan the layers, let the method replace them            network -> network
    restore(network)                   the very modules that were there, and no listener left

A `Quantization` stands on the network while it is quantized: what was planned, what has been replaced, by what.
Methods replace through it alone, so that everything can be taken off again and stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ts_adapt.denoisers.execution import execution_of
from ts_adapt.denoisers.network import CORRECTION, QUANTIZATION
from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.calibration.collect import Call, check_calls
from ts_adapt.quantizers.calibration.output import measured
from ts_adapt.quantizers.layers.correction import OutputCorrection
from ts_adapt.quantizers.layers.plan import LayerOptions, PlannedLayer, plan, split_points
from ts_adapt.quantizers.layers.quantized_layer import Layer, Part, QuantizedLayer, SplitLayer
from ts_adapt.quantizers.layers.timestep import TimestepListener
from ts_adapt.storage.files import sha256_of_json

FINGERPRINT_VALUES = 256


class Quantizer(ABC):
    """A method, with its options: quantizes the layers of a `Quantization`.

    name             in the registry, and in files
    Options          the dataclass of its options, JSON values
    needs_calls      whether it is calibrated
    needs_training   whether what it puts into the network is to be trained (`training.fine_tune`) before it is used
    """

    name: ClassVar[str]
    Options: ClassVar[type[Any]]

    def __init__(self, options: Any = None) -> None:
        self.options = options if options is not None else self.Options()

    @property
    def needs_calls(self) -> bool:
        return False

    @property
    def needs_training(self) -> bool:
        return False

    @abstractmethod
    def apply(self, to: Quantization, calls: Sequence[Call]) -> None:
        """Replace layers of `to.network` through `to.replace`; `calls` are checked, and empty if not needed."""


class Quantization:
    """What is being done to `network`.

    method    the name of the quantizer; options, its own and those of the layers, as JSON
    planned   every layer with a weight matrix, and what becomes of it
    originals name -> the module (or other attribute) that stood there
    left      name -> the reason why the method itself kept the layer in full precision
    """

    def __init__(self, network: nn.Module, method: str, options: dict[str, Any], layers: LayerOptions) -> None:
        self.network = network
        self.method, self.options, self.layer_options = method, options, layers
        self.planned: list[PlannedLayer] = plan(network, layers)
        self.fingerprint = fingerprint(network)
        self.originals: dict[str, Any] = {}
        self.left: dict[str, str] = {}
        self._listener: TimestepListener | None = None
        self._correcting: RemovableHandle | None = None
        self._placed = _place(network)

    @property
    def listener(self) -> TimestepListener:
        """What hears the network's timestep, from the first time that it is asked for."""
        if self._listener is None:
            self._listener = TimestepListener(self.network)
        return self._listener

    def layers(self) -> dict[str, Layer]:
        """The layers to quantize, by name, as they are in full precision; of a split one, its parts."""
        names: list[str] = []
        for layer in self.planned:
            if layer.reason is None:
                split = isinstance(self.network.get_submodule(layer.name), SplitLayer)
                names += [f"{layer.name}.parts.{part}" for part in (0, 1)] if split else [layer.name]
        now: dict[str, Any] = {name: self.network.get_submodule(name) for name in names}
        return {name: self.originals.get(name, module) for name, module in now.items()}

    def leave(self, name: str, reason: str) -> None:
        """Keep the layer `name` in full precision after all; `reason` is told in the plan and the report."""
        self.left[name] = reason
        self.planned = [replace(layer, reason=reason) if layer.name == name else layer for layer in self.planned]

    def replace(self, name: str, new: Any) -> None:
        """Put `new` where `name` stands, under all names of the same module; what was there first is remembered."""
        old = attribute(self.network, name)
        names = [name]
        if isinstance(old, nn.Module):
            names = [other for other, module in self.network.named_modules(remove_duplicate=False) if module is old]
        for other in names:
            self.originals.setdefault(other, old)
            _set(self.network, other, new)

    def correct(self, part: OutputCorrection) -> None:
        """Have `part` correct what the network says."""
        self.network.add_module(CORRECTION, part)
        self._correcting = self.network.register_forward_hook(part.hook)
        self.originals[CORRECTION] = None

    def undo(self) -> None:
        """Put back what was there; on another device or in another precision if the network has since been moved."""
        now = _place(self.network)
        if self._correcting is not None:
            self._correcting.remove()
            del self.network._modules[CORRECTION], self.originals[CORRECTION]
        for name, original in reversed(self.originals.items()):
            if now != self._placed and isinstance(original, nn.Module):
                original.to(*now)
            _set(self.network, name, original)
        self.originals.clear()
        if self._listener is not None:
            self._listener.stop()
        for name in (QUANTIZATION, "save_pretrained"):
            self.network.__dict__.pop(name, None)


def quantize(
    network: nn.Module, method: Quantizer, calls: Sequence[Call] = (), *, layers: LayerOptions | None = None
) -> nn.Module:
    """Quantize `network` in place and return it.

    calls   the calibration set, for methods that need one, and to correct what the network says
    layers  which stay in full precision, and what is done around them

    Raises TsAdaptError for a network that is quantized already or has nothing to quantize, and for a calibration set
    that is empty or of another shape; the network is then as it was.
    """
    if is_quantized(network):
        raise TsAdaptError(
            f"{type(network).__name__} is quantized already, by {quantization_of(network).method}; restore it first"
        )
    layers = layers or LayerOptions()
    if method.needs_calls or layers.correct:
        check_calls(network, calls)
    with torch.no_grad():
        full = [call.run(network) for call in calls] if layers.correct else []
    to = begin(network, method.name, asdict(method.options), layers)
    try:
        if to.layer_options.split_shortcuts:
            for name, at in split_points(network, to.planned).items():
                to.replace(name, SplitLayer(to.layers()[name], at))
        method.apply(to, calls if method.needs_calls else ())
        if layers.correct:
            listener = to.listener
            with torch.no_grad():
                to.correct(measured(calls, full, [call.run(network) for call in calls], listener))
    except BaseException:
        to.undo()
        raise
    return network


def begin(network: nn.Module, method: str, options: dict[str, Any], layers: LayerOptions) -> Quantization:
    """A `Quantization` standing on `network`, with nothing replaced yet.

    Raises TsAdaptError for quantized attention in a compiled network (`denoisers.execution`).
    """
    if options.get("attention") and execution_of(network).compile is not None:
        raise TsAdaptError(
            f"{method} quantizes attention, which cannot be compiled; leave model.compile out, or take "
            f"{method}+plain-attention"
        )
    to = Quantization(network, method, options, layers)
    network.__dict__[QUANTIZATION] = to
    if hasattr(network, "save_pretrained"):
        network.__dict__["save_pretrained"] = _refuse_to_save
    return to


def _refuse_to_save(*_: Any, safe_serialization: bool = True, **__: Any) -> None:
    """In place of the network's `save_pretrained`, whose files would be loaded as a network in full precision."""
    raise TsAdaptError(
        "the network is quantized, and what save_pretrained wrote of it would load as another network; save the "
        "pipeline after ts_adapt.quantizers.quantization.restore(network), and what was found by "
        "ts_adapt.quantizers.storage.save(network, folder), which load(network, folder) puts back"
    )


def restore(network: nn.Module) -> nn.Module:
    """Take the quantization off: the same modules and tensors as before. TsAdaptError if there is none."""
    quantization_of(network).undo()
    return network


def is_quantized(network: nn.Module) -> bool:
    return QUANTIZATION in network.__dict__


def quantization_of(network: nn.Module) -> Quantization:
    """The quantization that stands on `network`; TsAdaptError if there is none."""
    if not is_quantized(network):
        raise TsAdaptError(f"{type(network).__name__} is not quantized; call quantize first")
    found: Quantization = network.__dict__[QUANTIZATION]
    return found


@dataclass(frozen=True)
class Size:
    """quantized_weights  how many weights are quantized; all_weights, how many parameters the network has
    bits               true bits a quantized weight: codes, scales, zeros, codebooks, padding
    weight_bytes       of the whole network: layers in full precision, biases, what quantizes the inputs
    full_bytes         the same in full precision
    """

    quantized_weights: int
    all_weights: int
    bits: float
    weight_bytes: int
    full_bytes: int


def size_of(network: nn.Module) -> Size:
    """What `network` weighs, quantized or not."""
    layers = [layer for _, layer in quantized_layers(network)]
    stored = sum(layer.stored.bytes for layer in layers)
    numel = sum(layer.numel for layer in layers)
    parts = [module for module in network.modules() if isinstance(module, Part)]
    nested = {id(inner) for part in parts for inner in part.modules() if inner is not part}
    outer = [part for part in parts if id(part) not in nested]
    inside = {id(p) for part in outer for p in part.parameters()}
    others = [p for p in network.parameters() if id(p) not in inside]
    rest = sum(p.numel() * p.element_size() for p in others)
    of = quantization_of(network) if is_quantized(network) else None
    replaced = [of.originals[layer.name] for layer in of.planned if layer.name in of.originals] if of else []
    full = rest + sum(m.weight.numel() * m.weight.element_size() for m in replaced)
    return Size(
        quantized_weights=numel,
        all_weights=numel + sum(p.numel() for p in others),
        bits=8 * stored / numel if numel else 0.0,
        weight_bytes=sum(part.bytes for part in outer) + rest,
        full_bytes=full,
    )


def quantized_layers(network: nn.Module) -> list[tuple[str, QuantizedLayer]]:
    """Every quantized layer of `network`, the halves of split ones included, by name."""
    return [(name, module) for name, module in network.named_modules() if isinstance(module, QuantizedLayer)]


def fingerprint(network: nn.Module) -> str:
    """A sha256 of the class, of names, shapes and dtypes, and of up to FINGERPRINT_VALUES values of every tensor."""
    rows: list[Any] = [type(network).__name__]
    for name, tensor in sorted(network.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // FINGERPRINT_VALUES)][:FINGERPRINT_VALUES].double().cpu()
        rows.append([name, list(tensor.shape), str(tensor.dtype), sample.nan_to_num().tolist()])
    return sha256_of_json(rows)


def _place(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and precision of the network, by its first parameter."""
    first = next(network.parameters())
    return first.device, first.dtype


def attribute(network: nn.Module, name: str) -> Any:
    """What stands at the dotted `name` in `network`, a module or not."""
    parent, _, last = name.rpartition(".")
    return getattr(network.get_submodule(parent), last)


def _set(network: nn.Module, name: str, value: Any) -> None:
    parent, _, last = name.rpartition(".")
    holder = network.get_submodule(parent)
    if not isinstance(value, nn.Module):
        holder._modules.pop(last, None)
    setattr(holder, last, value)
