"""Predictors on disk: a file with the weights and the static grids, and a config with everything else.

`nfe` of the config lists the NFEs that belong to the numbers of steps in `network`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError, one_line
from ts_adapt.interfaces import NoiseSchedule
from ts_adapt.numerics import validate_times
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.remedies import command
from ts_adapt.storage.files import check_schema, read_json, read_tensors, write_json, write_tensors
from ts_adapt.storage.layout import ALL, CONFIG, PREDICTOR, TENSORS

MAX_ORDER = 4
PREDICTORS: dict[str, type[OneShot | Recursive]] = {"one-shot": OneShot, "recursive": Recursive}
PREDICTOR_NAMES = (*PREDICTORS, *(f"{kind}{ALL}" for kind in PREDICTORS))


def save_predictor(folder: Path, predictor: OneShot | Recursive, about: dict[str, Any]) -> None:
    """Write `predictor` under `folder`; the config last, so that a folder with a config is complete."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in predictor.state_dict().items()}
    write_tensors(folder / TENSORS, tensors)
    config = {**PREDICTOR.head, "kind": predictor.kind, "network": predictor.options, **about}
    write_json(folder / CONFIG, config)


def load_predictor(folder: str | Path, noise_schedule: NoiseSchedule) -> tuple[OneShot | Recursive, dict[str, Any]]:
    """The predictor under `folder` for a model with this noise schedule, and its config; TsAdaptError naming what is
    wrong."""
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        raise TsAdaptError(f"there is no predictor in {folder}; train one with {command('train')}")
    config = read_json(folder / CONFIG)
    PREDICTOR.check(config, folder / CONFIG, "train the predictor again")
    if not isinstance(config.get("kind"), str) or config["kind"] not in PREDICTORS:
        raise TsAdaptError(
            f"{folder} holds a predictor of kind {config.get('kind')!r}; known: {', '.join(PREDICTORS)}; train it again"
        )
    tensors = read_tensors(folder / TENSORS)
    try:
        network = dict(config["network"])
        kind = PREDICTORS[config["kind"]]
        _check_network(kind, network, tensors)
        counts = [steps + 1 for steps in network.pop("steps")]
        grids = [
            validate_times(times, noise_schedule, what=f"a static grid in {folder}")
            for times in tensors["static_times"].split(counts)
        ]
        predictor = kind(noise_schedule, grids, tuple(network.pop("shape")), **network)
        predictor.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError, RuntimeError) as error:
        raise TsAdaptError(
            f"{folder} holds no valid predictor ({one_line(error)}); remove it and train it again"
        ) from error
    for key, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise TsAdaptError(f"{folder / TENSORS}: {key} holds a NaN or infinite value; train it again")
    return predictor, config


def nfes_of(config: Mapping[str, Any]) -> list[int]:
    """The NFEs that the config of a predictor names, which belong to its numbers of steps."""
    given = config.get("nfe")
    return [nfe for nfe in given if isinstance(nfe, int)] if isinstance(given, list) else []


def made_for(config: Mapping[str, Any], path: Path) -> tuple[str, list[int]]:
    """The solver and the NFEs in the config of a predictor at `path`; TsAdaptError where it names none."""
    check_schema(config, {"solver": str, "nfe": list}, path)
    if not nfes_of(config):
        raise TsAdaptError(f"{path} names no NFE; train the predictor again")
    return config["solver"], nfes_of(config)


def _check_network(kind: type[OneShot | Recursive], network: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """ValueError unless the options in config.json are those of the weights, before anything is built from them."""
    found = {
        "width": tensors["encoder.step"].shape[1],
        "hidden": tensors["encoder.weight"].shape[1],
        "classes": tensors["encoder.classes.weight"].shape[0] - 1 if "encoder.classes.weight" in tensors else 0,
        "text": tensors["encoder.text.weight"].shape[1] if "encoder.text.weight" in tensors else 0,
    }
    for key, size in found.items():
        if network[key] != size:
            raise ValueError(f"its {key} is {network[key]}, that of the weights in the tensors {size}")
    scales = network.get("scales")
    if (scales is not None) != ("encoder.guidance.weight" in tensors):
        raise ValueError(f"its scales of guidance are {scales}, and the weights in the tensors say otherwise")
    low, high = (1.0, 2.0) if scales is None else scales
    if not 0 < low < high < math.inf:
        raise ValueError(f"its scales of guidance are {scales}; they are two numbers above 0 that rise")
    steps = network["steps"]
    if not isinstance(steps, list) or not all(type(n) is int and n > 0 for n in steps) or steps != sorted(set(steps)):
        raise ValueError(f"its numbers of steps are {steps}; they are whole numbers that rise")
    channels, *size = network["shape"]
    places = sum(map(kind.asked, steps))
    if [places, kind.pictures * channels, *size] != list(tensors["encoder.mean"].shape):
        raise ValueError(
            f"it is for samples of {network['shape']} and {steps} steps, the weights in the tensors for others"
        )
    if not 1 <= network["order"] <= MAX_ORDER:
        raise ValueError(f"its order is {network['order']}, that of a solver is from 1 to {MAX_ORDER}")
