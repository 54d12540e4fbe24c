"""Tiny random pipelines of any class of diffusers, of what its `__init__` says that it is made of.

A component is made by the class that its argument is annotated with: networks and autoencoders by `sizes.SIZES`,
encoders and tokenizers by `stand_ins`, a scheduler by `scheduler_for`. `OTHERS` says what a pipeline needs beside.
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from diffusers_zoo.others import betas, flow, others
from diffusers_zoo.sizes import SIZES
from diffusers_zoo.stand_ins import Encoder, ImageEncoder, ImageProcessor, SafetyChecker, Tokenizer, Words

NOT_MADE = ("safety_checker", "watermarker", "image_encoder", "feature_extractor", "prompt_enhancer", "duration_head")
"""Components that pipelines do without where they may."""


class NotBuilt(Exception):
    """The tests have no components for a class."""


def classes() -> dict[str, type]:
    """All pipeline classes of the installed diffusers by name, but for their base."""
    found = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Pipeline")}
    return {name: kind for name, kind in found.items() if inspect.isclass(kind) and issubclass(kind, DiffusionPipeline)
            and kind is not DiffusionPipeline}  # fmt: skip


def pipeline(name: str) -> Any:
    """A tiny pipeline of the class `name`, with random weights, the same at each call; else `NotBuilt`."""
    kind, needs = classes()[name], others(name)
    torch.manual_seed(0)
    made: dict[str, Any] = {}
    module = sys.modules[kind.__module__]
    if not hasattr(module, "ftfy"):
        module.ftfy = Words  # type: ignore[attr-defined]
    for key, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        if key in needs.get("given", {}):
            given = needs["given"][key]
            made[key] = given() if callable(given) else given
            continue
        try:
            made[key] = _component(name, key, parameter, needs.get("sizes", {}).get(key, {}))
        except (TypeError, IndexError, ValueError) as error:
            raise NotBuilt(f"{key}: {type(error).__name__}: {error}") from error
    try:
        pipe = kind(**made)
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {error}") from error
    for owner, what in ((pipe, "set"), (module, "module")):
        for key, value in needs.get(what, {}).items():
            setattr(owner, key, value)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def put(pipe: Any, scheduler: Any) -> None:
    """Let `pipe`, and the pipelines that it is made of, sample with `scheduler` in place of its own."""
    own = pipe.scheduler
    for one in [pipe, *vars(pipe).values()]:
        if isinstance(one, DiffusionPipeline) and getattr(one, "scheduler", None) is own:
            one.scheduler = scheduler


def _component(pipeline_name: str, key: str, parameter: Any, sizes: Any) -> Any:
    named = list(_names(parameter.annotation))
    optional = parameter.default is None or "NoneType" in named
    if key.endswith("scheduler"):
        return scheduler_for(pipeline_name, named)
    if "tokenizer" in key or key in ("processor", "text_processor"):
        return Tokenizer()
    if key.startswith(("text_encoder", "prior_text_encoder")) or key == "bert":
        projected: Any = any("Projection" in one for one in named) or ("MultilingualCLIP" in named and "twice")
        return _ready(Encoder(projected, **sizes))
    if key == "safety_checker" and "CosmosSafetyChecker" in named:
        return SafetyChecker()
    if key == "requires_safety_checker" or key == "add_watermarker":
        return False
    if key.endswith(NOT_MADE) and not sizes and (optional or "Safety" in "".join(named) or "afety" in key):
        return None
    if key.endswith("image_encoder"):
        return _ready(ImageEncoder())
    if "processor" in key or "feature_extractor" in key:
        return ImageProcessor()
    for one in [sizes["class"]] if "class" in sizes else named:
        if one in SIZES:
            found = getattr(diffusers, one, None) or _found_in_pipelines(one)
            torch.manual_seed(len(key))
            own = {key: value for key, value in sizes.items() if key not in ("needed", "class")}
            return _ready(found(**SIZES[one] | own))
    if key == "guider":
        return diffusers.ClassifierFreeGuidance()
    if parameter.default is not parameter.empty:
        return parameter.default
    raise NotBuilt(f"no sizes for {key}: {' or '.join(named)}")


def _found_in_pipelines(name: str) -> Any:
    """A class of components that diffusers does not name itself, in the pipelines that have it."""
    for kind in classes().values():
        for parameter in inspect.signature(kind.__init__).parameters.values():
            for one in _types(parameter.annotation):
                if getattr(one, "__name__", "") == name:
                    return one
    raise NotBuilt(f"diffusers has no {name}")


def _types(annotation: Any) -> Iterator[Any]:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        for one in typing.get_args(annotation):
            yield from _types(one)
    else:
        yield annotation


def _names(annotation: Any) -> Iterator[str]:
    return (getattr(one, "__name__", str(one)) for one in _types(annotation))


def _ready(module: nn.Module) -> nn.Module:
    """Random weights, none of them zero: layers that begin as nothing would hide what they are told. Some tokens that
    stand for padding begin as whatever the memory held."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if not weight.any() or "scale_shift_table" in name or name.endswith("pad_token"):
                weight.normal_(0, 0.1)
    return module.eval().requires_grad_(False)


def scheduler_for(pipeline_name: str, named: list[str]) -> Any:
    """The scheduler that a pipeline comes with: one of betas, one of a rectified flow, or one of its own."""
    given = others(pipeline_name).get("scheduler")
    if given is not None:
        return given()
    if any("FlowMatch" in one for one in named):
        return flow()
    usual = ("EulerDiscrete", "Karras", "DDIM", "DDPMScheduler", "PNDM", "DPMSolverMultistep", "SchedulerMixin")
    if any(one.startswith(usual) for one in named):
        return betas()
    return getattr(diffusers, named[0])()
