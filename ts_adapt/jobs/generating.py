"""evaluate, the first half: every schedule sampled on noises that no search has seen, each leaving a run file.

The product is cachers x quantizers x solvers x NFE x schedules. A cacher or quantizer that the network does not take is
skipped, and said so; `skipped` remembers why.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ts_adapt.assembly import grid_names, steps_of
from ts_adapt.evaluation.benchmark import Entry, fingerprint
from ts_adapt.evaluation.metrics import Extractor, make_extractor
from ts_adapt.evaluation.runs import Clip, kept_run, run_entry
from ts_adapt.files import read_json, read_tensors, write_json, write_tensors
from ts_adapt.interfaces import StepPolicy, TimeGrid, TsAdaptError
from ts_adapt.jobs.accelerated import Impossible, accelerated, key_of
from ts_adapt.jobs.session import Session, is_shared
from ts_adapt.predictors.store import PREDICTORS
from ts_adapt.schedule_file import Schedule
from ts_adapt.search.objective import Batch
from ts_adapt.teacher.generate import read_prompts

SKIPPED, TEACHER = "skipped.json", "teacher.safetensors"
Pair = tuple[str, str]
"""The names of a cacher and of a quantizer."""


def generate(session: Session) -> None:
    """Sample every schedule of the experiment on the test noises, with every cacher and quantizer.

    What an earlier evaluation left of the very same stays as it is.
    """
    config, options, folder = session.config, session.config.evaluate, runs_of(session)
    _check_files(session)
    _, batch = session.teacher("test", options.samples)
    extractor = make_extractor(options.features, device=config.model.device, inception=options.inception)
    teacher_features(session, extractor)
    plan, clip = planned(session), _clip(session, batch)
    refused = skipped(session)
    total = sum(entry.samples for entries in plan.values() for entry in entries)
    with tqdm(total=total, desc="evaluate", unit="image", disable=not session.progress) as bar:
        for (cacher, quantizer), entries in plan.items():
            todo = [entry for entry in entries if _unfinished(entry, folder)]
            bar.update(sum(entry.samples for entry in entries if entry not in todo))
            refused.pop((cacher, quantizer), None)
            if not todo:
                continue
            try:
                with accelerated(session, cacher, quantizer):
                    for entry in todo:
                        bar.set_postfix_str(f"{entry.sampler} NFE {entry.nfe} {entry.schedule}")
                        objective = replace(session.objective(session.solver(entry.solver)), checkpoint=False)
                        run_entry(entry, objective, batch, extractor, folder, batch_size=options.batch_size, clip=clip)
                        bar.update(entry.samples)
            except Impossible as error:
                refused[cacher, quantizer] = str(error)
                tqdm.write(f"skipped: cacher {cacher}, quantizer {quantizer}: {error}")
                bar.update(sum(entry.samples for entry in todo))
    kept = [{"cacher": pair[0], "quantizer": pair[1], "reason": reason} for pair, reason in refused.items()]
    if kept or (folder / SKIPPED).exists():
        write_json(folder / SKIPPED, kept)


def runs_of(session: Session) -> Path:
    """The folder of the run files."""
    return session.workspace.evaluation / "runs"


def skipped(session: Session) -> dict[Pair, str]:
    """Why the pairs that were skipped so far were; what cannot be read is as none."""
    try:
        return {(kept["cacher"], kept["quantizer"]): kept["reason"] for kept in read_json(runs_of(session) / SKIPPED)}
    except (TsAdaptError, KeyError, TypeError):
        return {}


def planned(session: Session) -> dict[Pair, list[Entry]]:
    """Everything that is to be measured, by cacher and quantizer."""
    config = session.config
    full = [entry for solver in config.solvers for nfe in config.nfe for entry in _entries(session, solver, nfe)]
    plan = {}
    for quantizer in config.quantizers:
        for cacher in config.cachers:
            key = key_of(session, cacher, quantizer)
            plan[cacher, quantizer] = [
                replace(
                    entry, cacher=cacher, quantizer=quantizer,
                    fingerprint=fingerprint(entry.fingerprint, key) if key else entry.fingerprint,
                )
                for entry in full
            ]  # fmt: skip
    return plan


def _unfinished(entry: Entry, folder: Path) -> bool:
    run = kept_run(entry, folder)
    return run is None or run.cost is None


def teacher_features(session: Session, extractor: Extractor) -> Tensor:
    """The features `(n, D)` of the teacher's images for all test samples, kept beside the run files."""
    options, path = session.config.evaluate, runs_of(session) / TEACHER
    store, batch = session.teacher("test", options.samples)
    key = torch.frombuffer(
        bytearray(fingerprint(store.hash, options.features, options.samples).encode()), dtype=torch.uint8
    ).clone()
    try:
        kept = read_tensors(path, {"features": (options.samples, None), "fingerprint": (len(key),)})
        if torch.equal(kept["fingerprint"], key):
            return kept["features"]
    except TsAdaptError:
        pass
    with torch.inference_mode():
        parts = [extractor(session.denoiser.decode(x).float()).cpu() for x in batch.target.split(options.batch_size)]
    features = torch.cat(parts).float()
    write_tensors(path, {"features": features, "fingerprint": key})
    return features


def _clip(session: Session, batch: Batch) -> Clip | None:
    """The CLIP scores of images of the samples of `batch`; None where no model for them is asked for."""
    weights, path = session.config.evaluate.clip, session.config.teacher.prompts
    if weights is None:
        return None
    if path is None:
        raise TsAdaptError("evaluate.clip scores images by their prompts; give teacher.prompts, or leave it out")
    from ts_adapt.evaluation.clip import clip_scorer

    scorer, prompts = clip_scorer(weights, session.config.model.device), read_prompts(path)
    of_samples = [prompts[int(i) % len(prompts)] for i in batch.index]
    return lambda images, rows: scorer(images, of_samples[rows])


def _entries(session: Session, solver: str, nfe: int) -> list[Entry]:
    """Every schedule there is for `solver` and `nfe`: fixed grids, and what has been learned so far."""
    config, workspace = session.config, session.workspace
    samples, steps = config.evaluate.samples, steps_of(session.solver(solver), nfe)
    teacher, _ = session.teacher("test")
    base: tuple[object, ...] = (teacher.hash, solver, config.distance, config.evaluate.features)
    if config.evaluate.clip is not None:
        base += ("clip", config.evaluate.clip)

    def entry(name: str, kind: str, policy: StepPolicy | TimeGrid, key: object, count: int = samples) -> Entry:
        return Entry(solver, nfe, name, kind, policy, fingerprint(*base, key), count)

    entries = [entry(name, "fixed", grid, grid) for name, grid in session.fixed_grids(steps).items()]
    for name in session.shared_names(solver, nfe):
        grid = session.shared(name, solver, nfe).grid
        entries.append(entry(name, "static" if name.startswith("static") else "optimized", grid, grid))
    entries += _file_entries(session, solver, nfe, base)
    for kind in PREDICTORS:
        folder = workspace.predictor(kind, solver, nfe)
        if (folder / "config.json").exists():
            predictor = session.predictor(kind, solver, nfe)
            entries.append(entry(kind, kind, predictor.policy(), predictor.state_dict()))
    if (workspace.labels("test", solver, nfe) / "labels.json").exists():
        labels = session.labelled("test", solver, nfe)
        count = min(config.oracle_samples, len(labels.batch))
        if samples < count:
            raise TsAdaptError(
                f"evaluate.samples is {samples}, below the {count} samples of the oracle; raise it to {count}, "
                f"or lower oracle_samples to {samples}"
            )
        _, batch = session.teacher("test", count)
        if not torch.equal(labels.batch.index[:count], batch.index):
            raise TsAdaptError(
                f"the oracle of {solver}, NFE {nfe} does not cover the first {count} test samples; "
                "run `ts-adapt search --method per-sample --split test` again"
            )
        grid = TimeGrid(labels.times[:count])
        entries.append(entry("oracle", "oracle", grid, grid, count))
    return entries


def _file_entries(session: Session, solver: str, nfe: int, base: tuple[object, ...]) -> list[Entry]:
    """The schedule files of the config that are for `solver` and `nfe`."""
    entries = []
    for path in map(Path, session.config.evaluate.schedules):
        schedule = Schedule.load(path, session.noise)
        if (schedule.solver, schedule.nfe) == (solver, nfe):
            session.check_fit(path, solver, nfe, schedule.grid.steps, wanted=(solver, nfe))
            key = fingerprint(*base, schedule.grid)
            entries.append(
                Entry(solver, nfe, path.stem, "optimized", schedule.grid, key, session.config.evaluate.samples)
            )
    return entries


def _check_files(session: Session) -> None:
    """TsAdaptError for a schedule file that no solver and NFE of the config will meet, or a name met twice."""
    config = session.config
    names: dict[tuple[str, str, int], Path] = {}
    for path in map(Path, config.evaluate.schedules):
        schedule = Schedule.load(path, session.noise)
        if schedule.solver not in config.solvers or schedule.nfe not in config.nfe:
            raise TsAdaptError(
                f"{path} is for {schedule.solver}, NFE {schedule.nfe}, which is not evaluated; "
                f"add --solvers [{schedule.solver}] --nfe [{schedule.nfe}]"
            )
        key = path.stem, schedule.solver, schedule.nfe
        if key in names or path.stem in (*grid_names(), *PREDICTORS, "oracle") or is_shared(path.stem):
            other = f"{names[key]} too" if key in names else "a schedule of the comparison"
            raise TsAdaptError(f"{path} would be called {path.stem!r}, as is {other}; rename the file")
        names[key] = path
