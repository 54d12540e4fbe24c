"""How what jobs make and keep is read, and what they are given: configs, prompts, pictures."""

from __future__ import annotations

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch

from fuzzing import corpus
from fuzzing.checks import finite
from fuzzing.corpus import Files
from ts_adapt.cli import parse
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.comparison import Results
from ts_adapt.evaluation.features import read_image
from ts_adapt.evaluation.moments import read_moments
from ts_adapt.evaluation.records import kept_run
from ts_adapt.evaluation.report import page
from ts_adapt.evaluation.tables import as_text, group_tables
from ts_adapt.numerics import validate_grid
from ts_adapt.pictures import metadata_of
from ts_adapt.prompts import read_prompts
from ts_adapt.search.journal import Journal
from ts_adapt.search.labels import LabelStore
from ts_adapt.storage.files import sha256_of_json
from ts_adapt.teacher.store import TeacherStore, condition_of


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


def journal(folder: Path) -> None:
    for key in ("key", "another"):
        found = Journal(folder / "journal.json", key)
        for place in range(4):
            answer = found.recall([place / 7, 1.0], lambda: [0.0])
            assert isinstance(answer, list) and all(isinstance(x, float) and x == x for x in answer)
    Journal(folder / "journal.json", "key").remove()


def reseal_journal(files: Files) -> Files:
    """The checksum of the records as they are now."""
    try:
        kept = json.loads(files["journal.json"])
        return {"journal.json": json.dumps({**kept, "sha256": sha256_of_json(kept["records"])}).encode()}
    except (ValueError, LookupError, TypeError, RecursionError, UnicodeError):
        return files


def run(folder: Path) -> None:
    found = kept_run(corpus.ENTRY, folder)
    if found is None:
        raise TsAdaptError("measured anew")
    assert found.features.shape[0] == found.distance.shape[0] == found.times.shape[0] == 6
    finite(found.features, found.distance, found.times, *found.further.values())
    assert found.pictures.dtype == torch.uint8 and 0 <= found.seconds_per_image < float("inf")
    for value in found.further.values():
        assert len(value) == 6
    assert found.cost.flops >= 0 and found.cost.peak_memory >= 0


def results(folder: Path) -> None:
    found = Results.read(folder)
    if found is None:
        raise TsAdaptError("not joined")
    found.joined(found)
    for table in group_tables(found.rows, found.features).values():
        as_text(table)
    assert "<script" not in page(found, [], "t", ["n"])


def config(folder: Path) -> None:
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        found = parse(["teach", "--config", str(folder / "c.yml")]).config
    assert isinstance(found.name, str) and "/" not in found.name and isinstance(found.nfe, list)


def prompts(folder: Path) -> None:
    (path,) = folder.glob("p.*")
    found = read_prompts(path)
    assert found and all(isinstance(prompt, str) and prompt.strip() for prompt in found)
    assert all(prompt.encode() for prompt in found)


def image(folder: Path) -> None:
    pixels = read_image(folder / "a.png")
    assert pixels.ndim == 4 and pixels.shape[1] == 3
    finite(pixels)


def metadata(folder: Path) -> None:
    files = [folder / "a.png", folder / "sub" / "b.png"]
    for wanted in ("label", "prompt"):
        try:
            found = metadata_of(folder, wanted, files)
        except TsAdaptError as error:
            refusal = error
        else:
            assert found is not None and len(found) == len(files)
            assert all(isinstance(value, str) and isinstance(value.encode(), bytes) for value in found)
            return
    raise refusal


def moments(folder: Path) -> None:
    for found in read_moments(folder / "m.npz"):
        if found is not None:
            size = len(found.mean)
            assert found.mean.shape == (size,) and found.covariance.shape == (size, size)
            finite(torch.from_numpy(found.mean), torch.from_numpy(found.covariance))
