"""Predictors on disk: `model.safetensors` with the weights and the static grid, `config.json` with everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ts_adapt.files import read_json, read_tensors, write_json, write_tensors
from ts_adapt.interfaces import NoiseSchedule, TsAdaptError
from ts_adapt.numerics import validate_times
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive

FORMAT, VERSION = "ts_adapt-predictor", 2
MAX_WIDTH, MAX_HIDDEN, MAX_ORDER = 1024, 8192, 4
PREDICTORS: dict[str, type[OneShot | Recursive]] = {"one-shot": OneShot, "recursive": Recursive}


def save_predictor(folder: Path, predictor: OneShot | Recursive, about: dict[str, Any]) -> None:
    """Write `predictor` under `folder`; the config last, so that a folder with a config is complete."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in predictor.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors)
    config = {"format": FORMAT, "version": VERSION, "kind": predictor.kind, "network": predictor.options, **about}
    write_json(folder / "config.json", config)


def load_predictor(folder: Path, noise: NoiseSchedule) -> tuple[OneShot | Recursive, dict[str, Any]]:
    """The predictor under `folder` for a model with `noise`, and its config; TsAdaptError naming what is wrong."""
    if not (folder / "config.json").exists():
        raise TsAdaptError(f"there is no predictor in {folder}; train one with `ts-adapt train`")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("version") != VERSION:
        raise TsAdaptError(f"{folder / 'config.json'} is not of the format {FORMAT!r}, version {VERSION}")
    if not isinstance(config.get("kind"), str) or config["kind"] not in PREDICTORS:
        raise TsAdaptError(
            f"{folder} holds a predictor of kind {config.get('kind')!r}; known: {', '.join(PREDICTORS)}; train it again"
        )
    tensors = read_tensors(folder / "model.safetensors")
    try:
        network = dict(config["network"])
        times = validate_times(tensors["static_times"], noise, what=f"the static grid in {folder}")
        _check_network(network, tensors)
        predictor = PREDICTORS[config["kind"]](noise, times, tuple(network.pop("shape")), **network)
        predictor.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TsAdaptError(f"{folder} holds no valid predictor ({reason}); remove it and train it again") from error
    for key, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise TsAdaptError(f"{folder / 'model.safetensors'}: {key} holds a NaN or infinite value; train it again")
    return predictor, config


def _check_network(network: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """ValueError unless the options in config.json are those of the weights, before anything is built from them."""
    found = {
        "width": tensors["encoder.step"].shape[1],
        "hidden": tensors["encoder.weight"].shape[1],
        "classes": tensors["encoder.classes.weight"].shape[0] - 1 if "encoder.classes.weight" in tensors else 0,
        "text": tensors["encoder.text.weight"].shape[1] if "encoder.text.weight" in tensors else 0,
    }
    for key, size in found.items():
        if network[key] != size:
            raise ValueError(f"its {key} is {network[key]}, that of the weights in model.safetensors {size}")
    if list(network["shape"])[1:] != list(tensors["encoder.mean"].shape[2:]):
        raise ValueError(f"its shape is {network['shape']}, that of the weights in model.safetensors another")
    if not 1 <= network["order"] <= MAX_ORDER:
        raise ValueError(f"its order is {network['order']}, that of a solver is from 1 to {MAX_ORDER}")
