"""How schedules are read, in the package's own format and in others', and what predicts or serves them."""

from __future__ import annotations

import ast
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch

from fuzzing.checks import check_grid, finite, strict
from fuzzing.corpus import FLOW, SHAPE, TABLE, VP
from ts_adapt.config import Config
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import TimeGrid
from ts_adapt.jobs.export import export_schedule
from ts_adapt.jobs.import_schedule import import_schedule
from ts_adapt.predictors.store import load_predictor
from ts_adapt.schedulers.scheduler import LearnedScheduler
from ts_adapt.schedules.file import LearnedGrid

CONFIG = Config()
CONFIG.model.name = "gaussian-mixture"


def schedule(folder: Path) -> None:
    found = LearnedGrid.load(folder / "s.json")
    check_grid(found.grid)
    assert found.nfe >= found.grid.steps and not found.grid.per_sample
    for noise_schedule in (None, VP, FLOW):
        try:
            known = LearnedGrid.load(folder / "s.json", noise_schedule)
        except TsAdaptError:
            continue
        text = known.text(noise_schedule)
        strict(text)
        again = LearnedGrid.parse(text.encode(), "the text", noise_schedule)
        assert torch.equal(again.grid.times, known.grid.times) and again.about == known.about


def exported(folder: Path) -> None:
    """A schedule goes into the formats of other programs; what is executed there holds numbers and texts only."""
    texts = {}
    for kind in ("json", "sigmas", "comfyui", "a1111"):
        try:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                texts[kind] = export_schedule(CONFIG, str(folder / "s.json"), kind)
        except TsAdaptError as error:
            refusal = error
    if not texts:
        raise refusal
    if "sigmas" in texts:
        assert re.fullmatch(r"[\d.]+(,[\d.]+)*\n", texts["sigmas"])
    if "comfyui" in texts:
        (node,) = strict(texts["comfyui"]).values()
        assert node["class_type"] == "ManualSigmas"
    if "a1111" in texts:
        body = ast.parse(texts["a1111"]).body
        kinds = [type(node).__name__ for node in body]
        assert kinds == ["Expr", "ImportFrom", "Import", "Assign", "Assign", "Assign", "FunctionDef", "Try"]
        name, label, sigmas = (ast.literal_eval(node.value) for node in body[3:6])  # type: ignore[attr-defined]
        assert isinstance(name, str) and isinstance(label, str) and all(0 < s < 1e40 for s in sigmas)


def sigmas(folder: Path) -> None:
    out = folder / "out.json"
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        found = import_schedule(CONFIG, str(folder / "s.txt"), "sigmas", out=str(out))
    check_grid(found.grid, VP)
    strict(out.read_text())


def timesteps(folder: Path) -> None:
    from ts_adapt.schedules.formats import READERS

    text = (folder / "s.txt").read_text(errors="replace")
    for noise_schedule in (TABLE, FLOW):
        for read in READERS.values():
            try:
                times, _ = read(text, "s.txt", noise_schedule)
            except TsAdaptError as error:
                refusal = error
            else:
                check_grid(TimeGrid(times), noise_schedule)
                return
    raise refusal


def predictor(folder: Path) -> None:
    found, config = load_predictor(folder, VP)
    for value in found.state_dict().values():
        finite(value)
    strict(json.dumps(config, allow_nan=False))
    x, shape = torch.randn(2, *SHAPE), tuple(found.options["shape"])
    if shape != SHAPE:
        return
    for steps in found.learned:
        policy = found.policy(steps)
        node, state = policy.init(x, {"guidance_scale": torch.tensor([2.0, 3.0])})
        while node.index < steps:
            t = node.t
            finite(t, *node.held.values())
            node, state = policy.next(x, x / 2, node, state)
            assert bool((node.t < t).all()), "times do not fall"


def scheduler(folder: Path) -> None:
    found = LearnedScheduler.from_pretrained(folder)
    steps = found.source.learned[0] if found.source.learned else 4
    if found.known_noise is None:
        return
    found.set_timesteps(steps)
    assert len(found.timesteps) == steps
    finite(found.timesteps)
    x = torch.randn(2, *SHAPE)
    for t in found.timesteps[:3]:
        finite(found.network_timesteps(x))
        x = found.step(x / 2, t, x).prev_sample
    assert x.shape == (2, *SHAPE)
