"""A denoiser, or a whole pipeline, by name: a model of the zoo, a pipeline folder, or a hub id.

    fashion-ddpm            a model that travels with the package
    ./folder, /abs/folder   a folder that diffusers' `save_pretrained` has written
    owner/name              a folder if there is one, else a pipeline on the Hugging Face hub
    ./model.safetensors     an original file of SD, SDXL, SD3 or Flux; configs of its parts come from the hub
    module:function, file.py:function    what a function of the user's own makes (`from_code`)

Weights are read as safetensors only: the other formats are pickles, which run code when opened.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ts_adapt import zoo
from ts_adapt.denoisers.from_code import is_place
from ts_adapt.errors import TsAdaptError, one_line, unknown
from ts_adapt.storage.files import read_json

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
SINGLE_FILES = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35_medium": "StableDiffusion3Pipeline",
    "sd35_large": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
}
"""Diffusers' name of the kind of an original file -> the pipeline that it is loaded as."""
ONE_AT_A_TIME = threading.Lock()
"""Held while a pipeline is read, as what its libraries report is listened to in one place."""
DENOISING = ("unet", "transformer", "transformer_2")
"""What pipelines call the networks that denoise."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_pipeline(
    name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    quantization_config: Mapping[str, Any] | None = None, weights: str | Path | None = None,
) -> Any:  # fmt: skip
    """The pipeline of diffusers called `name`, of any class; see the module's head.

    device, dtype        of its networks; None: the CPU, and float32
    quantization_config  of the network that denoises, which is quantized by diffusers as it is read: `quant_backend`,
                         and what diffusers' config of that backend takes; None or empty: it is not
    weights              a file that this network is read from, in place of the pipeline's: .safetensors, in diffusers'
                         names or the original ones, or .gguf, whose few bits stay as they are

    Raises TsAdaptError for an unknown name, a missing or foreign folder, a hub that cannot be reached, a backend that
    is unknown or not installed, and weights that are not the network's.
    """
    pipe = _found(name, dtype, _Network(quantization_config or {}, None if weights is None else Path(weights)))
    with quiet():
        return pipe if device is None else pipe.to(device)


def image_to_image(pipe: Any, *, masked: bool = False) -> Any:
    """The pipeline that starts from an image, of the parts of `pipe`; `pipe` itself if it is one.

    masked  one that paints anew what a mask says, and keeps the rest of the image

    Raises TsAdaptError where diffusers has none for it.
    """
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    if repaints(pipe) if masked else starts_from_image(pipe):
        return pipe
    try:
        with quiet():
            return (AutoPipelineForInpainting if masked else AutoPipelineForImage2Image).from_pipe(pipe)
    except ValueError as error:
        kind, out = ("inpainting", "the mask") if masked else ("image-to-image", "the image to start from")
        raise TsAdaptError(f"diffusers has no {kind} pipeline for {type(pipe).__name__}; leave {out} out") from error


def starts_from_image(pipe: Any) -> bool:
    """Whether the pipeline noises an image and starts from that."""
    return {"image", "strength"} <= inspect.signature(type(pipe).__call__).parameters.keys()


def repaints(pipe: Any) -> bool:
    """Whether the pipeline is given a mask, and keeps of an image what it does not cover."""
    return {"image", "mask_image"} <= inspect.signature(type(pipe).__call__).parameters.keys()


@dataclass(frozen=True)
class _Network:
    """What is asked of the network that denoises, beside the pipeline that it is of."""

    quantization: Mapping[str, Any]
    weights: Path | None

    def __bool__(self) -> bool:
        return bool(self.quantization) or self.weights is not None

    def options(self, source: str, dtype: torch.dtype | None) -> dict[str, Any]:
        """What the loader of the pipeline `source` is given for it; TsAdaptError where it cannot be had."""
        configs = _quantization(self.quantization) if self.quantization else {}
        if self.weights is not None:
            return _from_own_file(self.weights.expanduser(), source, dtype, configs)
        from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig

        return {"quantization_config": PipelineQuantizationConfig(quant_mapping=configs)} if configs else {}


def _quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Diffusers' config of the backend, for each name that the network may have."""
    from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    given = dict(config)
    backend = given.pop("quant_backend", None)
    if backend not in KNOWN:
        raise unknown("quant_backend of model.quantization_config", str(backend), KNOWN)
    try:
        if backend == "torchao":
            import torchao.quantization as kinds

            kind = given["quant_type"]
            name, options = next(iter(kind.items())) if isinstance(kind, Mapping) else (kind, {})
            given["quant_type"] = getattr(kinds, name)(**options)
        return {network: KNOWN[backend](**given) for network in DENOISING}
    except Exception as error:
        raise TsAdaptError(
            f"model.quantization_config cannot be used ({one_line(error, 160)}); {backend} has to be installed, and be "
            "given what diffusers' config of it takes"
        ) from error


def _from_own_file(
    weights: Path, source: str, dtype: torch.dtype | None, quantization: Mapping[str, Any]
) -> dict[str, Any]:
    """The network of the pipeline `source`, read from `weights`, by its name there."""
    import diffusers

    if weights.suffix not in (".safetensors", ".gguf"):
        raise TsAdaptError(f"model.weights is {weights}; expected a file .safetensors or .gguf")
    if not weights.is_file():
        raise TsAdaptError(f"model.weights is {weights}, and there is no such file; check its path")
    if weights.suffix == ".gguf" and quantization:
        raise TsAdaptError(f"{weights} is quantized as it is; leave model.quantization_config out")
    dtype, folder = dtype or torch.float32, Path(source).is_dir()
    try:
        index = diffusers.DiffusionPipeline.load_config(source, local_files_only=folder)
        name = next(name for name in DENOISING if (index.get(name) or [None])[0] is not None)
        config: Any = quantization.get(name)
        if weights.suffix == ".gguf":
            config = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
        with quiet():
            network = getattr(diffusers, index[name][1]).from_single_file(
                str(weights), config=source, subfolder=name, dtype=dtype, quantization_config=config,
                local_files_only=folder,
            )  # fmt: skip
    except Exception as error:
        needs = "; pip install gguf, which reads such files" if isinstance(error, ImportError) else ""
        raise TsAdaptError(
            f"the network of {source!r} cannot be read from {weights} ({one_line(error, 160)}){needs}"
        ) from error
    return {name: network}


def _found(name: str, dtype: torch.dtype | None, network: _Network) -> Any:
    if is_place(name):
        raise TsAdaptError(f"{name!r} makes a denoiser, and a pipeline is wanted; give a folder or a hub id")
    if name in zoo.MODELS:
        folder = zoo.paths()[name]
        if not folder.is_dir():
            raise TsAdaptError(f"the zoo's model {name!r} is missing from {folder}; reinstall ts_adapt with its data")
        return _from_folder(folder, dtype, network)
    if Path(name).expanduser().is_dir():
        return _from_folder(Path(name).expanduser(), dtype, network)
    if Path(name).suffix in (".safetensors", *PICKLES):
        if network:
            raise TsAdaptError(
                f"{name} is a whole pipeline in one file; model.weights and model.quantization_config need the folder "
                "of a pipeline, or one on the hub"
            )
        return _from_single_file(Path(name).expanduser(), dtype)
    if HUB_ID.fullmatch(name):
        return _from_hub(name, dtype, network)
    if "/" in name or "\\" in name or name.startswith((".", "~")):
        raise TsAdaptError(
            f"there is no folder {name!r}; expected one that a diffusers pipeline's save_pretrained wrote"
        )
    near = difflib.get_close_matches(name, zoo.MODELS, 1, 0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise TsAdaptError(
        f"no model is called {name!r}; {hint}the zoo has {', '.join(zoo.MODELS)}; "
        "for any other give a pipeline folder, a hub id owner/name, or module:function"
    )


def _from_single_file(path: Path, dtype: torch.dtype | None) -> Any:
    """The pipeline in an original file, whose kind is known by its tensors."""
    import diffusers
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type
    from safetensors import SafetensorError, safe_open

    if path.suffix in PICKLES:
        raise TsAdaptError(f"{path} is a pickle, which runs code when opened; convert it to safetensors")
    try:
        with safe_open(path, "pt") as file:
            shapes = {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            kind = infer_diffusers_model_type({key: SimpleNamespace(shape=shape) for key, shape in shapes.items()})
    except (OSError, SafetensorError) as error:
        raise TsAdaptError(f"{path} cannot be read ({one_line(error)}); check its path") from error
    if kind not in SINGLE_FILES:
        raise TsAdaptError(
            f"{path} is an original file of the kind {kind!r}, and those of {', '.join(SINGLE_FILES)} are loaded; "
            "give a pipeline folder or a hub id"
        )
    failure = f"the original file {path} ({kind}) cannot be loaded", "; a folder of its pipeline can"
    return _read(str(path), failure, dtype, getattr(diffusers, SINGLE_FILES[kind]).from_single_file)


def _from_folder(folder: Path, dtype: torch.dtype | None, network: _Network) -> Any:
    if not (folder / "model_index.json").is_file():
        raise TsAdaptError(
            f"{folder} has no model_index.json: it is not a folder that a diffusers pipeline's save_pretrained wrote"
        )
    from diffusers.utils.import_utils import is_transformers_available

    index = read_json(folder / "model_index.json")
    listed = index.items() if isinstance(index, dict) else ()
    parts = {name: place for name, place in listed if isinstance(place, list)}
    of_texts = [name for name, place in parts.items() if place[:1] == ["transformers"]]
    if of_texts and not is_transformers_available():
        raise TsAdaptError(
            f"the {of_texts[0]} of the pipeline in {folder} needs transformers, which is not installed; "
            "pip install 'ts_adapt[text]'"
        )
    failure = f"the pipeline in {folder} cannot be loaded", ""
    absent = {name: None for name, place in parts.items() if place == [None, None]}  # some have to be told: T5 of SD3
    return _read(str(folder), failure, dtype, local_files_only=True, **absent, **network.options(str(folder), dtype))


def _from_hub(name: str, dtype: torch.dtype | None, network: _Network) -> Any:
    failure = (
        f"{name!r} is no folder here, and could not be had from the Hugging Face hub",
        "; without a network give a pipeline folder or a model of the zoo",
    )
    return _read(name, failure, dtype, **network.options(name, dtype))


def _read(source: str, failure: tuple[str, str], dtype: torch.dtype | None, read: Any = None, **options: Any) -> Any:
    """The pipeline, or TsAdaptError of `failure` with the cause in its middle, whatever the loader `read` raises."""
    from diffusers import DiffusionPipeline

    read = read or DiffusionPipeline.from_pretrained
    try:
        with ONE_AT_A_TIME, quiet(), _lacking() as lacking:
            pipe = read(source, dtype=dtype or torch.float32, use_safetensors=True, **options)
    except Exception as error:
        raise TsAdaptError(f"{failure[0]} ({one_line(error, 160)}){failure[1]}") from error
    for name, part in pipe.components.items():
        tensors = part.state_dict() if isinstance(part, nn.Module) else {}
        keys = lacking.get(id(part)) or [key for key, value in tensors.items() if value.is_meta]
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            cause = f"its {name} is incomplete, without the weights {keys[0]}{more}"
            raise TsAdaptError(f"{failure[0]} ({cause}){failure[1]}; fetch or save it again")
    return pipe


@contextmanager
def _lacking() -> Iterator[dict[int, list[str]]]:
    """Of the models of transformers that are loaded in the block, by their ids, the names of the weights that no file
    holds, which would be random numbers. Those of diffusers are left on the device "meta"."""
    from diffusers.utils.import_utils import is_transformers_available

    found: dict[int, list[str]] = {}
    if not is_transformers_available():
        yield found
        return
    import transformers

    kind_of_all: Any = transformers.PreTrainedModel
    former: Any = vars(kind_of_all)["from_pretrained"]

    @functools.wraps(former.__func__)
    def reporting(kind: type, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output_loading_info"):
            return former.__func__(kind, *args, **kwargs)
        model, report = former.__func__(kind, *args, **kwargs, output_loading_info=True)
        found[id(model)] = sorted(report["missing_keys"])
        return model

    kind_of_all.from_pretrained = classmethod(reporting)
    try:
        yield found
    finally:
        kind_of_all.from_pretrained = former


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and warnings of diffusers and transformers, which are about their ways of loading."""
    from diffusers.utils import logging
    from diffusers.utils.import_utils import is_transformers_available

    libraries: list[Any] = [logging]
    if is_transformers_available():
        from transformers.utils import logging as of_transformers

        libraries.append(of_transformers)
    former = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, bars in former:
            library.set_verbosity(level)
            if bars:
                library.enable_progress_bar()
