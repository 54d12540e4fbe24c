"""What a pipeline's call is given: what all samples share, and what each has of its own, kept as numbers.

    prompt         (B, PROMPT_BYTES) uint8: the UTF-8 bytes of each sample's prompt, zeros behind them
    class_labels   (B,)
    number         (B,): the sample's own; of each folder of pictures that an argument names, it has the one of this
                   number, modulo how many there are
    seed           (B,): by it and the number a sample draws
    guidance_scale (B,), or a number: one for all of a call, where samples have scales of their own

What all share is given by name, as in the pipeline's own documentation; a `negative_prompt`, or a `prompt_2`, is for
every sample. What a pipeline draws beside its starting noise is in `draws`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError, unknown
from ts_adapt.interfaces import Condition
from ts_adapt.pictures import picture_files, read_picture
from ts_adapt.pipelines.draws import Sample, generators
from ts_adapt.storage.files import sha256_of_file, sha256_of_json

PROMPT_BYTES = 4096
"""The longest prompt, in bytes."""
OURS = {
    "prompt", "class_labels", "batch_size", "num_inference_steps", "timesteps", "sigmas", "latents", "generator",
    "output_type", "return_dict", "callback", "callback_steps", "callback_on_step_end",
    "callback_on_step_end_tensor_inputs", "num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt",
}  # fmt: skip
"""Arguments that are no options: the program gives them, or their defaults hold."""
SCALES = ("guidance_scale", "cfg_scale")
"""What the names of scales of guidance end in."""


def as_bytes(prompts: Sequence[str]) -> Tensor:
    """Prompts as `(B, PROMPT_BYTES)` uint8; TsAdaptError for one that is longer, or holds a zero."""
    rows = torch.zeros(len(prompts), PROMPT_BYTES, dtype=torch.uint8)
    for row, prompt in zip(rows, prompts, strict=True):
        data = prompt.encode()
        if len(data) > PROMPT_BYTES or 0 in data:
            raise TsAdaptError(
                f"the prompt {prompt[:40]!r}... has {len(data)} bytes; prompts have at most {PROMPT_BYTES}, no zeros"
            )
        row[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    return rows


def as_texts(rows: Tensor) -> list[str]:
    """The prompts of `as_bytes`."""
    return [bytes(row).rstrip(b"\0").decode() for row in rows.cpu().numpy()]


def samples_of(condition: Condition, batch: int) -> list[Sample]:
    """The seed and number of each sample; 0 where the condition says none."""
    found = [condition[key].tolist() if key in condition else [0] * batch for key in ("seed", "number")]
    return list(zip(*found, strict=True))


class Arguments:
    """The arguments of the calls of `pipe`.

    shared      those of `call` that all samples share
    folders     the pictures of each argument of `call` that names a folder of them
    generators  whether calls are given some: a few do not take them beside starting noise

    Raises TsAdaptError for what the pipeline does not take, or the program gives by itself.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any]) -> None:
        self.name = type(pipe).__name__
        self.takes = inspect.signature(type(pipe).__call__).parameters
        for key in call:
            if key in OURS:
                raise TsAdaptError(f"call.{key} is given by the program to each sample; leave it out")
            if key not in self.takes or key == "self":
                known = [name for name in self.takes if name not in OURS and name != "self"]
                raise unknown(f"argument of {self.name}, call.", key, known)
        check_scales(pipe, call)
        self.generators = True
        self.folders = {
            key: picture_files(Path(value).expanduser()) for key, value in call.items() if _is_folder(key, value)
        }
        self.shared = {key: value for key, value in call.items() if key not in self.folders}

    def of_call(self, key: str) -> Any:
        """What all samples share of an argument: what is given, or else its default; None where it is not taken."""
        default = self.takes[key].default if key in self.takes else None
        return self.shared.get(key, default)

    @cached_property
    def numbered(self) -> str | None:
        """What identifies the pictures of all folders; None: there are none."""
        if not self.folders:
            return None
        return sha256_of_json({key: [sha256_of_file(file) for file in files] for key, files in self.folders.items()})

    @property
    def takes_prompts(self) -> bool:
        return "prompt" in self.takes

    def of(self, condition: Condition, batch: int) -> dict[str, Any]:
        """The arguments for `batch` samples, lists where there are several; one that the condition says nothing of has
        an empty prompt, class 0, picture 0."""
        samples = samples_of(condition, batch)
        given = self.alike(batch, listed=batch > 1)
        if self.takes_prompts:
            prompts = as_texts(condition["prompt"]) if "prompt" in condition else [""] * batch
            given["prompt"] = prompts if batch > 1 else prompts[0]
        if "class_labels" in self.takes:
            labels = condition.get("class_labels")
            given["class_labels"] = [0] * batch if labels is None else labels.tolist()
        if "batch_size" in self.takes:
            given["batch_size"] = batch
        if (scale := condition.get("guidance_scale")) is not None:
            scales = torch.as_tensor(scale).reshape(-1)
            if bool((scales != scales[0]).any()):
                raise TsAdaptError(f"a call of {self.name} has one scale of guidance; solve samples of others by turns")
            given["guidance_scale"] = float(scales[0])
        if "generator" in self.takes and self.generators:
            own = generators(samples)
            given["generator"] = own if batch > 1 else own[0]
        for key, pictures in self.pictures([number for _, number in samples]).items():
            given[key] = pictures if batch > 1 else pictures[0]
        return given

    def alike(self, batch: int, *, listed: bool) -> dict[str, Any]:
        """What all of `batch` samples share; `listed`: their prompts are a list, and so is what goes with them."""
        listed = listed and self.takes_prompts
        return {
            key: [value] * batch if listed and "prompt" in key and isinstance(value, str) else _for_each(value, batch)
            for key, value in self.shared.items()
        }

    def pictures(self, numbers: Iterable[int]) -> dict[str, list[Any]]:
        """Of each folder the picture of each of `numbers`."""
        return {key: [read_picture(files[i % len(files)]) for i in numbers] for key, files in self.folders.items()}


def check_scales(pipe: Any, given: Mapping[str, Any]) -> None:
    """TsAdaptError for a scale of guidance below 1, other than 0, with which a pipeline does not guide at all."""
    for key, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and key.endswith(SCALES) and value < 1 and value != 0 and key in _above_one(type(pipe)):
            raise TsAdaptError(
                f"{key} is {value:g}, and {type(pipe).__name__} guides by a scale above 1 or not at all; give 1 for "
                "none, or more"
            )


def _above_one(kind: type) -> set[str]:
    """What pipelines of the class ask to be above 1, by its name, as their code has it: `self._guidance_scale > 1`."""
    found = set()
    for each in kind.__mro__:
        with suppress(OSError, TypeError, SyntaxError):  # whose code is not to be had, or not by itself
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(each)))):
                match node:
                    case ast.Compare(
                        left=ast.Name(id=name) | ast.Attribute(attr=name),
                        ops=[ast.Gt() | ast.GtE()],
                        comparators=[ast.Constant(value=1)],
                    ):
                        found.add(name.removeprefix("_"))
    return found


def _for_each(value: Any, batch: int) -> Any:
    """A tensor of one row, such as an embedding, as one for each sample."""
    if isinstance(value, Tensor) and value.shape[:1] == (1,):
        return value.repeat(batch, *[1] * (value.ndim - 1))
    return value


def _is_folder(key: str, value: Any) -> bool:
    """Whether `value` names the folder of an argument that takes a picture for each sample."""
    if "image" not in key or not isinstance(value, str):
        return False
    if not Path(value).expanduser().is_dir():
        raise TsAdaptError(f"call.{key} is {value!r}, no folder; give one with a picture for each sample, in turn")
    return True
