"""A denoiser by name: what `denoisers.load` finds, and of any other pipeline its own loop.

    fashion-ddpm, ./folder, owner/name, module:function    see `denoisers.load`
    ./model.safetensors                                    an original file of SD, SDXL, SD3 or Flux
    gaussian-mixture                                       an analytic one, by `build_denoiser` alone

Pipelines of `denoisers.pipeline.PIPELINES` are called directly, network by network; all others, and those for which
arguments of their call are given, run as they are (`PipelineDenoiser`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ts_adapt import zoo
from ts_adapt.assembly import ANALYTIC, ModelOptions, device_and_dtype, prepare
from ts_adapt.denoisers.from_code import from_code, is_place
from ts_adapt.denoisers.load import load_pipeline
from ts_adapt.denoisers.pipeline import from_pipeline, is_direct
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Denoiser


def load(
    name: str | Path,
    prediction: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    call: Mapping[str, Any] | None = None,
    quantization_config: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
) -> Any:
    """The denoiser called `name`; see the module's head.

    prediction  epsilon, sample, v or velocity; None: what the pipeline's scheduler says, or the function
    device, dtype  of the network; None: the CPU, and float32
    call        arguments of the pipeline's call that all samples share, see `PipelineDenoiser`
    quantization_config, weights  see `load_pipeline`

    Raises TsAdaptError for an unknown name, a missing or foreign folder, a hub that cannot be reached, and a pipeline
    that cannot be learned on.
    """
    name = str(name)
    if is_place(name):
        options = {
            "prediction": prediction, "call": call, "quantization_config": quantization_config, "weights": weights,
        }  # fmt: skip
        for option, given in options.items():
            if given:
                raise TsAdaptError(f"model.{option} is {given!r}, but {name!r} says it by itself; leave it out")
        return from_code(name, device, dtype)
    pipe = load_pipeline(name, device, dtype, quantization_config, weights)
    if call or not is_direct(pipe):
        if prediction is not None:
            raise TsAdaptError(
                f"model.prediction is {prediction!r}, but {type(pipe).__name__} says by itself what it predicts; leave "
                "it out"
            )
        from ts_adapt.pipelines.denoiser import PipelineDenoiser

        return PipelineDenoiser(pipe, call)
    denoiser = from_pipeline(pipe, prediction)
    null_class = zoo.MODELS.get(name)
    if null_class is not None:
        denoiser.null_condition = {"class_labels": null_class}
    return denoiser


def guided_by_samples(denoiser: Denoiser, low: float) -> Denoiser:
    """The denoiser of a pipeline, which takes the scale of guidance of each sample, `low` or more, from its condition.

    Raises TsAdaptError for a pipeline whose call is given no such scale, or none as low, and another denoiser.
    """
    from ts_adapt.pipelines.arguments import check_scales
    from ts_adapt.pipelines.denoiser import PipelineDenoiser

    if not isinstance(denoiser, PipelineDenoiser) or "guidance_scale" not in denoiser.arguments.takes:
        raise TsAdaptError("option guidance is a range, and the model's call takes no guidance_scale; give one number")
    if "guidance_scale" in denoiser.arguments.shared:
        raise TsAdaptError("option guidance is a range, and model.call has one guidance_scale; leave out one of them")
    check_scales(denoiser.pipe, {"guidance_scale": low})
    denoiser.alone = True
    return denoiser


def build_denoiser(options: ModelOptions) -> Denoiser:
    """The denoiser of `options`, on its device; TsAdaptError for what its network cannot be."""
    device, dtype = device_and_dtype(options)
    if options.name in ANALYTIC:
        for option in (
            "channels_last", "fused_qkv", "compile", "call", "quantization_config", "weights", "prediction"
        ):  # fmt: skip
            if getattr(options, option):
                raise TsAdaptError(f"model.{option} is for networks, and {options.name!r} is none; leave it out")
        return ANALYTIC[options.name]()
    denoiser: Denoiser = load(
        options.name, options.prediction, device, dtype, options.call, options.quantization_config, options.weights
    )
    if denoiser.network is not None:
        prepare(denoiser.network, options)
    elif options.execution:
        raise TsAdaptError(f"{options.name!r} has no network that is a torch module; leave options of the network out")
    return denoiser
