"""Predictors on disk: `model.safetensors` with the weights and the static grid, `config.json` with everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ts_adapt.files import read_json, read_tensors, write_json, write_tensors
from ts_adapt.interfaces import NoiseSchedule, TsAdaptError
from ts_adapt.numerics import validate_times
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive

FORMAT, VERSION = "ts_adapt-predictor", 1
KINDS: dict[str, type[OneShot | Recursive]] = {"one-shot": OneShot, "recursive": Recursive}


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
    if config.get("kind") not in KINDS:
        raise TsAdaptError(f"{folder} holds a predictor of kind {config.get('kind')!r}; known: {', '.join(KINDS)}")
    tensors = read_tensors(folder / "model.safetensors")
    try:
        network = dict(config["network"])
        times = validate_times(tensors["static_times"], noise, what=f"the static grid in {folder}")
        predictor = KINDS[config["kind"]](noise, times, tuple(network.pop("shape")), **network)
        predictor.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise TsAdaptError(f"{folder} holds no valid predictor: {str(error).splitlines()[0]}") from error
    for key, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise TsAdaptError(f"{folder / 'model.safetensors'}: {key} holds a NaN or infinite value")
    return predictor, config
