"""A schedule's files: JSON and safetensors, in a folder or on the Hugging Face hub; no pickle is read or written.

scheduler_config.json                       every schedule
model.safetensors, config.json              a single predictor (the files of `predictors.store`)
nfe<N>/model.safetensors, nfe<N>/config.json    several predictors, each under the least N that it serves

Of the config one key says where the times come from: `grid` a fixed family, `grids` learned grids by their number of
steps, `predictors` the numbers of steps that predictors serve.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ts_adapt.errors import TsAdaptError, one_line
from ts_adapt.grids.corrections import field_names, grid_of
from ts_adapt.interfaces import MAX_STEPS, NoiseSchedule, TimeGrid
from ts_adapt.predictors.store import load_predictor, save_predictor
from ts_adapt.schedulers.plan import Predictor, Source
from ts_adapt.schedules.file import MAX_BYTES
from ts_adapt.schedules.name import fixed_name
from ts_adapt.storage.files import make_folder, parse_json, read_bytes
from ts_adapt.storage.layout import CONFIG, SCHEDULER_CONFIG, TENSORS, predictor_folder

DEFAULT_GRID = "uniform"
FILES = (SCHEDULER_CONFIG, CONFIG, TENSORS, f"nfe*/{CONFIG}", f"nfe*/{TENSORS}")
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def find(
    name: str | os.PathLike[str], subfolder: str | None, options: Mapping[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """The folder of a schedule, brought from the hub unless it is here, and the `options` that are not the hub's."""
    rest = {key: value for key, value in options.items() if key not in HUB_OPTIONS}
    if not isinstance(name, str | os.PathLike) or not isinstance(subfolder, str | None):
        raise TsAdaptError(f"a schedule is in a folder, or has a hub id; got {name!r}, subfolder {subfolder!r}")
    try:
        folder = Path(name).expanduser()
        here = folder.is_dir()
    except (OSError, RuntimeError, TypeError) as error:
        raise TsAdaptError(
            f"{one_line(name)} cannot be a folder ({one_line(error)}); give that of a schedule"
        ) from error
    if not here:
        folder = _from_hub(str(name), subfolder, {key: options[key] for key in HUB_OPTIONS if key in options})
    return (folder / subfolder if subfolder else folder), rest


def _from_hub(name: str, subfolder: str | None, options: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [f"{subfolder}/{file}" if subfolder else file for file in FILES]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, **options))
    except Exception as error:
        raise TsAdaptError(
            f"{name!r} is no folder here, and no schedule could be had under that name from the Hugging Face hub "
            f"({one_line(error)}); give a folder that save_pretrained wrote, or a hub id owner/name"
        ) from error


def read_config(folder: Path, class_name: str) -> dict[str, Any]:
    """The config in `folder`; TsAdaptError where there is none, or one of another class."""
    if not (folder / SCHEDULER_CONFIG).is_file():
        hint = ""
        if (folder / CONFIG).is_file():
            hint = ": it may be a bare predictor, read with load_predictor and made a schedule by from_predictors"
        raise TsAdaptError(f"{folder} has no {SCHEDULER_CONFIG} and holds no schedule that save_pretrained wrote{hint}")
    config = parse_json(read_bytes(folder / SCHEDULER_CONFIG, limit=MAX_BYTES), folder / SCHEDULER_CONFIG)
    found = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(config, dict) or found != class_name:
        raise TsAdaptError(
            f"{folder / SCHEDULER_CONFIG} is the config of {found or 'no scheduler'}, not of {class_name}; "
            f"{class_name}.from_config takes over its betas and prediction type"
        )
    return config


def source_of(grid: Any, grids: Any, predictors: Any, noise_schedule: NoiseSchedule | None) -> Source:
    """The source that a config names by one of `grid`, `grids` and `predictors`; `DEFAULT_GRID` where it names none.

    Raises TsAdaptError for more than one, for what is no such thing, and for learned grids without a noise
    schedule.
    """
    if sum(value is not None for value in (grid, grids, predictors)) > 1:
        raise TsAdaptError("a schedule has one of `grid`, `grids` and `predictors`; more than one was given")
    if predictors is not None:
        return Source(plans=dict.fromkeys(sorted(steps for served in served_by(predictors) for steps in served)))
    if grids is not None:
        found = grids_from_json(grids)
        if not found or noise_schedule is None:
            lacking = "no noise schedule: give it betas" if found else "no grid: give at least one that was learned"
            raise TsAdaptError(f"`grids` of the schedule has {lacking}")
        return Source.of_grids(found, noise_schedule)
    return Source(family=str(fixed_name(DEFAULT_GRID if grid is None else str(grid))))


def served_by(predictors: Any) -> list[list[int]]:
    """The numbers of steps of each predictor that a config names: [5, [10, 20]] are one for 5, and one for 10 and 20.

    Raises TsAdaptError for anything else.
    """
    listed = predictors if isinstance(predictors, list | tuple) else []
    found = [list(served) if isinstance(served, list | tuple) else [served] for served in listed]
    every = [steps for served in found for steps in served]
    whole = all(type(steps) is int and 1 <= steps <= MAX_STEPS for steps in every)
    if not found or not all(found) or not whole or len(set(every)) < len(every):
        raise TsAdaptError(
            "`predictors` lists numbers of steps, such as [5, 10], or [[5, 10]] for one that serves both; got "
            f"{predictors!r}"
        )
    return found


def grids_to_json(grids: Mapping[int, TimeGrid]) -> dict[str, dict[str, Any]]:
    """`grids` as a config holds them: lists of numbers by name, by the number of steps."""
    return {
        str(steps): {name: value.tolist() for name, value in {"times": grid.times, **grid.corrections}.items()}
        for steps, grid in sorted(grids.items())
    }


def grids_from_json(data: Any) -> dict[int, TimeGrid]:
    """The inverse of `grids_to_json`; TsAdaptError for anything else."""
    grids: dict[int, TimeGrid] = {}
    try:
        for steps, entry in data.items():
            given = {name: torch.tensor(values, dtype=torch.float64) for name, values in entry.items()}
            foreign = given.keys() - {"times", *field_names()}
            if foreign or not 1 <= int(steps) <= MAX_STEPS or int(steps) in grids:
                raise ValueError(f"{steps!r} with {', '.join(entry)}")
            grids[int(steps)] = grid_of(given)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TsAdaptError(
            f'`grids` of a schedule are {{"5": {{"times": [...]}}, ...}}, lists of numbers by the number of steps; '
            f"these are not ({one_line(error)})"
        ) from error
    return grids


def read_predictors(folder: Path, predictors: Any, noise_schedule: NoiseSchedule) -> dict[int, Predictor]:
    """The predictors that a config in `folder` names, by the numbers of steps that they serve.

    Raises TsAdaptError for one that is missing, damaged, or of other steps.
    """
    found: dict[int, Predictor] = {}
    named = served_by(predictors)
    for served in named:
        alone = len(named) == 1 and (folder / CONFIG).is_file()
        path = folder if alone else folder / predictor_folder(min(served))
        predictor, _ = load_predictor(path, noise_schedule)
        if set(predictor.learned) != set(served):
            has, wanted = (", ".join(map(str, sorted(steps))) for steps in (predictor.learned, served))
            raise TsAdaptError(f"the predictor in {path} is for {has} steps, the config says {wanted}")
        found |= dict.fromkeys(served, predictor)
    return found


def write_predictors(folder: Path, source: Source, about: Mapping[str, Any]) -> None:
    """Write the predictors, each with what is known `about` it."""
    missing = tuple(steps for steps, plan in source.plans.items() if plan is None)
    if missing:
        raise TsAdaptError(
            f"the weights of the predictors for {missing} are not here; load the schedule with from_pretrained"
        )
    predictors = dict.fromkeys(source.predictors.values())
    for predictor in predictors:
        path = folder / predictor_folder(predictor.learned[0]) if len(predictors) > 1 else folder
        save_predictor(make_folder(path), predictor, {**about, "nfe": list(predictor.learned)})


def folder_for(directory: Any) -> Path:
    """The folder `directory`, made if it is not there; TsAdaptError where no schedule can be saved in it."""
    if not isinstance(directory, str | os.PathLike):
        raise TsAdaptError(f"a schedule is saved in a folder; got {directory!r}")
    folder = Path(directory)
    try:
        if folder.is_file() or (folder / SCHEDULER_CONFIG).is_dir():
            taken = folder if folder.is_file() else folder / SCHEDULER_CONFIG
            kind = "file" if taken is folder else "folder"
            raise TsAdaptError(f"{taken} is a {kind}; a schedule is saved in a folder, as files: name another")
        return make_folder(folder)
    except (OSError, ValueError) as error:
        raise TsAdaptError(f"{one_line(folder)} cannot be a folder ({one_line(error)}); name another") from error
