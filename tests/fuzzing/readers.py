"""How each kind of file is read, and what has to hold of whatever was accepted."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from fuzzing import corpus
from fuzzing.corpus import FLOW, SHAPE, TABLE, VP, Files
from ts_adapt.cli import parse
from ts_adapt.config import Config
from ts_adapt.evaluation.metrics import read_image
from ts_adapt.evaluation.page import render
from ts_adapt.evaluation.report import Results
from ts_adapt.evaluation.runs import kept_run
from ts_adapt.evaluation.tables import markdown
from ts_adapt.files import is_finite, sha256_of_json
from ts_adapt.interfaces import NoiseSchedule, TimeGrid, TsAdaptError
from ts_adapt.jobs.exchange import export_schedule, import_schedule
from ts_adapt.numerics import validate_grid
from ts_adapt.predictors.resume import Checkpoint
from ts_adapt.predictors.store import load_predictor
from ts_adapt.prompts import read_prompts
from ts_adapt.pruning.blocks import put_back
from ts_adapt.pruning.plan_file import apply
from ts_adapt.quantizers import training
from ts_adapt.quantizers.network import is_quantized, restore
from ts_adapt.quantizers.storage import load
from ts_adapt.schedule_file import MAX_STEPS, Schedule
from ts_adapt.schedulers.scheduler import LearnedScheduler
from ts_adapt.search.journal import Journal
from ts_adapt.search.labels import LabelStore
from ts_adapt.teacher.store import TeacherStore, condition_of

Read = Callable[[Path], None]


@dataclass(frozen=True)
class Reader:
    """read    reads the files in a folder; raises TsAdaptError to refuse them, AssertionError where it should have
    sets    valid files by variant
    weight  how often it comes up; the quick ones come more often
    reseal  puts the checksums right after a mutation, as whoever forges a file does; None: it has none
    """

    read: Read
    sets: dict[str, Files]
    weight: int = 4
    reseal: Callable[[Files], Files] | None = None


def finite(*values: torch.Tensor | None) -> None:
    for value in values:
        assert value is None or is_finite(value)


def strict(text: str) -> Any:
    """JSON as its standard has it, without NaN and Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} was written")

    return json.loads(text, parse_constant=refuse)


def check_grid(grid: TimeGrid, noise: NoiseSchedule | None = None) -> None:
    assert 1 <= grid.steps <= MAX_STEPS
    validate_grid(grid, noise)
    finite(grid.times, grid.model_times, grid.output_scale, grid.coefficients)


def schedule(folder: Path) -> None:
    found = Schedule.load(folder / "s.json")
    check_grid(found.grid)
    assert found.nfe >= found.grid.steps and not found.grid.per_sample
    for noise in (None, VP, FLOW):
        try:
            known = Schedule.load(folder / "s.json", noise)
        except TsAdaptError:
            continue
        text = known.text(noise)
        strict(text)
        again = Schedule.parse(text.encode(), "the text", noise)
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
    from ts_adapt.schedule_formats import READERS

    text = (folder / "s.txt").read_text(errors="replace")
    for noise in (TABLE, FLOW):
        for read in READERS.values():
            try:
                times, _ = read(text, "s.txt", noise)
            except TsAdaptError as error:
                refusal = error
            else:
                check_grid(TimeGrid(times), noise)
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
        node, state = policy.init(x, {})
        while node.index < steps:
            t = node.t
            finite(t, node.output_scale, node.coefficients, node.model_time)
            node, state = policy.next(x, x / 2, node, state)
            assert bool((node.t < t).all()), "times do not fall"


def labels(folder: Path) -> None:
    store = LabelStore.open(folder, corpus.TEACHER_HASH)
    try:
        store.has(0, torch.arange(5))
        LabelStore.create(folder, {"teacher": corpus.TEACHER_HASH, "solver": "unipc-2"})
    except TsAdaptError:
        pass
    found = store.load()
    count = len(found.index)
    assert count and len(set(found.index.tolist())) == count
    assert found.grid.times.shape[0] == len(found.distance) == len(found.static_distance) == len(found.start) == count
    finite(found.distance, found.static_distance)
    validate_grid(found.grid, batch=count)


def teacher(folder: Path) -> None:
    store = TeacherStore.open(folder)
    store.verify()
    indices = store.indices
    assert len(indices) <= 100_000
    if not indices:
        raise TsAdaptError("no shard is intact")
    data = store.load(indices[:50])
    count = len(data["index"])
    assert data["x_T"].shape == data["target"].shape == (count, *store.config["shape"])
    assert data["index"].tolist() == indices[:50]
    for value in data.values():
        assert len(value) == count
        finite(value)
    condition_of(data)


def reseal_teacher(files: Files) -> Files:
    """Checksums of the shards and of the config as they are now; of what is no manifest any more, none."""
    import hashlib

    try:
        manifest = json.loads(files["manifest.json"])
        manifest["hash"] = sha256_of_json(manifest["config"])
        for name, shard in manifest["shards"].items():
            shard["sha256"] = hashlib.sha256(files.get(name, b"")).hexdigest()
        return {**files, "manifest.json": json.dumps(manifest).encode()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, UnicodeError):
        return files


NETWORK = corpus.network()


def quantization(folder: Path) -> None:
    try:
        found = load(NETWORK, folder)
        for value in found.state_dict().values():
            finite(value)
        assert corpus.call(found, 500.0, 1).run(found).shape == (1, *SHAPE)
        restore(NETWORK)
    finally:
        left = is_quantized(NETWORK) or len(NETWORK._forward_pre_hooks)
        if left:
            restore(NETWORK)
            raise AssertionError("a part of the quantization was left on the network")


@cache
def tuned() -> Any:
    return corpus.tuned()


def fine_tuning(folder: Path) -> None:
    network, trained, optimizer = tuned()
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer.state.clear()
    try:
        losses = training._resumed(folder, network, training.FineTuneOptions(), trained, optimizer)
        finite(torch.tensor(losses), *(parameter.detach() for parameter in trained.values()))
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    finally:
        for name, parameter in trained.items():
            parameter.data.copy_(before[name])


def pruning(folder: Path) -> None:
    found = apply(NETWORK, folder / "p.json")
    assert corpus.call(found, 500.0, 1).run(found).shape == (1, *SHAPE)
    put_back(found)


def reseal_journal(files: Files) -> Files:
    """The checksum of the records as they are now."""
    try:
        kept = json.loads(files["journal.json"])
        return {"journal.json": json.dumps({**kept, "sha256": sha256_of_json(kept["records"])}).encode()}
    except (ValueError, LookupError, TypeError, RecursionError, UnicodeError):
        return files


def journal(folder: Path) -> None:
    for key in ("key", "another"):
        found = Journal(folder / "journal.json", key)
        for place in range(4):
            answer = found.recall([place / 7, 1.0], lambda: [0.0])
            assert isinstance(answer, list) and all(isinstance(x, float) and x == x for x in answer)
    Journal(folder / "journal.json", "key").remove()


def checkpoint(folder: Path) -> None:
    trained = corpus.module()
    state = trained.state_dict()
    optimizer = torch.optim.AdamW(trained.parameters())
    states = dict.fromkeys(("weights", "average", "best"), state)
    found = Checkpoint(folder / "c.safetensors").load(states, trained.parameters(), 5)
    if found is None:
        raise TsAdaptError("begun anew")
    for name in ("weights", "average", "best"):
        trained.load_state_dict(found[name])
        finite(*found[name].values())
    epoch = [int(number) for number in found["progress"][:4]]
    assert len(epoch) == 4 and all(0 <= number < 2**53 for number in epoch)
    finite(torch.tensor(found["progress"][4]))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": found["optimizer"]})
    trained(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    finite(*trained.state_dict().values())


def run(folder: Path) -> None:
    found = kept_run(corpus.ENTRY, folder)
    if found is None:
        raise TsAdaptError("measured anew")
    assert found.features.shape[0] == found.distance.shape[0] == found.times.shape[0] == 6
    finite(found.features, found.distance, found.times, *found.further.values())
    assert found.pictures.dtype == torch.uint8 and 0 <= found.seconds_per_image < float("inf")
    for value in found.further.values():
        assert len(value) == 6
    if found.cost is not None:
        assert found.cost.flops >= 0 and found.cost.peak_memory >= 0


def results(folder: Path) -> None:
    found = Results.read(folder)
    if found is None:
        raise TsAdaptError("not joined")
    found.joined(found)
    conclusions = found.conclusions()
    markdown(found.rows, found.features)
    page = render(found.rows, found.differences, conclusions, [], title="t", notes=["n"], distance="l2", features="zoo")
    assert "<script" not in page


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


def config(folder: Path) -> None:
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        _, _, found = parse(["teach", "--config", str(folder / "c.yml")])
    assert isinstance(found.name, str) and "/" not in found.name and isinstance(found.nfe, list)


def prompts(folder: Path) -> None:
    (path,) = folder.glob("p.*")
    found = read_prompts(path)
    assert found and all(isinstance(prompt, str) and prompt.strip() for prompt in found)
    assert all(prompt.encode() for prompt in found)


def image(folder: Path) -> None:
    from ts_adapt.jobs.pipelines import _read_image as read_start

    read_start(str(folder / "a.png"))
    pixels = read_image(folder / "a.png", "RGB")
    assert pixels.ndim == 4 and pixels.shape[1] == 3
    finite(pixels)


CONFIG = Config()
CONFIG.model.name = "gaussian-mixture"


def all_readers() -> dict[str, Reader]:
    """Every reader by name; making their valid files takes seconds."""
    logging.set_verbosity_error()
    tuned()
    lists = corpus.lists()
    return {
        "schedule": Reader(schedule, corpus.schedules(), 12),
        "export": Reader(exported, corpus.schedules(), 4),
        "sigmas": Reader(sigmas, {name: files for name, files in lists.items() if name != "timesteps"}, 6),
        "timesteps": Reader(timesteps, lists, 6),
        "predictor": Reader(predictor, corpus.predictors(), 10),
        "labels": Reader(labels, corpus.labels(), 10),
        "teacher": Reader(teacher, corpus.teachers(), 10, reseal_teacher),
        "quantization": Reader(quantization, corpus.quantizations(), 4),
        "fine-tuning": Reader(fine_tuning, corpus.fine_tunings(), 4),
        "pruning": Reader(pruning, corpus.prunings(), 2),
        "journal": Reader(journal, corpus.journals(), 6, reseal_journal),
        "checkpoint": Reader(checkpoint, corpus.checkpoints(), 8),
        "run": Reader(run, corpus.runs(), 8),
        "results": Reader(results, corpus.results(), 4),
        "scheduler": Reader(scheduler, corpus.schedulers(), 8),
        "config": Reader(config, corpus.configs(), 1),
        "prompts": Reader(prompts, corpus.prompts(), 4),
        "image": Reader(image, corpus.images(), 4),
    }
